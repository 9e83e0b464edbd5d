"""Typed reading of a plan's data: config.json and the TOML files."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rempart_platform.plan.errors import PlanError

UNKNOWN = "unknown"
_MOST = 10**8
"""No size of a model or machine is near it; arithmetic with what is beyond ends in nonsense."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Named values of unknown types. A value of None counts as absent; one of the wrong type is a PlanError."""

    values: Mapping[str, object]
    origin: str
    """The file, and where in it; begins every error message."""

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be text, got {value!r}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty when absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(name, f"must be a list of texts, got {value!r}")
        return tuple(value)

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
            raise self.error(name, f"must be an integer between {least} and {_MOST}, got {value!r}")
        return value

    def number(self, name: str) -> float:
        """A positive finite number."""
        value = self._get(name, None)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 < value < float("inf"):
            raise self.error(name, f"must be a positive number, got {value!r}")
        return float(value)

    def known_number(self, name: str) -> float | None:
        """A positive finite number; None when absent or "unknown"."""
        return self.number(name) if self.has(name) and self.values[name] != UNKNOWN else None

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def section(self, name: str) -> "Fields":
        """Nested fields; a PlanError when absent."""
        value = self._get(name, None)
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be a table, got {value!r}")
        return Fields(value, f"{self.origin}: {name}")

    def sections(self) -> dict[str, "Fields"]:
        """All values, each as nested fields."""
        return {name: self.section(name) for name in self.values}

    def listed(self, name: str) -> Sequence["Fields"]:
        """A list of nested fields."""
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
            raise self.error(name, "must be a list of tables")
        return [Fields(each, f"{self.origin}: {name}[{index}]") for index, each in enumerate(value)]

    def refuse_others(self, known: Sequence[str]) -> None:
        """A misspelt field is an error, not a default."""
        for name in self.values:
            if name not in known:
                raise self.error(name, f"is not a field; known: {', '.join(known)}")

    def error(self, name: str, problem: str) -> PlanError:
        return PlanError(f"{self.origin}: {name} {problem}")

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.error(name, "is missing")
        return default


def read_toml(path: Path) -> Fields:
    """Raises PlanError naming the file, and the line of a mistake in the syntax."""
    try:
        return Fields(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read ({error})") from error
    except ValueError as error:  # also of a number with thousands of digits, which is TOML
        raise PlanError(f"{path}: is not TOML: {error}") from error


def read_json(path: Path) -> Fields:
    """Raises PlanError naming the file, and the place of a mistake in the syntax."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise PlanError(f"{path}: must hold an object")
    return Fields(values, str(path))
