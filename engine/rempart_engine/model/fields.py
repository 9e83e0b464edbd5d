"""Typed reading of a model's metadata: config.json, or the key-value pairs of a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass

from rempart_engine.model.errors import ModelError


@dataclass(frozen=True, slots=True)
class Fields:
    """Named values of unknown types. A value of None counts as absent; one of the wrong type is a ModelError."""

    values: Mapping[str, object]
    origin: str
    """Where they were read; begins every error message."""

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be text, got {value!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, f"must be a positive integer, got {value!r}")
        return value

    def count_or_zero(self, name: str, default: int | None = None) -> int:
        """An integer that is not negative."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(name, f"must be an integer that is not negative, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 < value < float("inf"):
            raise self.error(name, f"must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; none when absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, f"must be a list of texts, got {value!r}")
        return tuple(value)

    def section(self, name: str) -> "Fields":
        """Nested fields; empty when absent."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be an object, got {value!r}")
        return Fields(value, f"{self.origin}: {name}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; none when absent."""
        value = self._get(name, [])
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise self.error(name, f"must be token ids, got {value!r}")
        return tuple(ids)

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.origin}: {name} {problem}")

    def _get(self, name: str, default: object) -> object:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.error(name, "is missing")
        return default
