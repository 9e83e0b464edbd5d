"""What is asked of a plan, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from rempart_platform.plan.errors import PlanError
from rempart_platform.plan.models import find_model
from rempart_platform.plan.placement import Setup
from rempart_platform.plan.shapes import ModelShape
from rempart_platform.plan.weights import WeightFormat

_DEFAULT_CONTEXTS = (8_192, 131_072)
_Format = TypeVar("_Format", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Question:
    """A model, and what is wanted of it.

    Args:
        contexts: tokens of a sequence, ascending; the last is the one that must fit.
        batches: sequences at once; none: 1, 16, and as many as fit.
        weight_format: None leaves the choice to `placement.best`.
        utilisation: share of a bound that costs assume.

    Raises:
        PlanError: the utilisation is no share.
    """

    model: ModelShape
    setup: Setup
    contexts: tuple[int, ...]
    batches: tuple[int, ...] = ()
    weight_format: WeightFormat | None = None
    utilisation: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.utilisation <= 1.0:
            raise PlanError(f"--utilisation must be above 0 and at most 1, got {self.utilisation:g}")

    @property
    def longest(self) -> int:
        return self.contexts[-1]


def ask(
    model: str,
    setup: Setup,
    *,
    weight_format: str | None,
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (),
    utilisation: float,
) -> Question:
    """A question in the words of a command line.

    Raises:
        PlanError: a model or format that is not known, or a context that is too long for the model.
    """
    shape = find_model(model)
    for context in contexts:
        if context > shape.max_model_len:
            raise PlanError(f"--context {context}: {shape.name} takes at most {shape.max_model_len} tokens")
    wanted = contexts or [min(context, shape.max_model_len) for context in _DEFAULT_CONTEXTS]
    return Question(
        model=shape,
        setup=setup,
        contexts=tuple(sorted(set(wanted))),
        batches=tuple(sorted(set(batches))),
        weight_format=None if weight_format is None else known_format(WeightFormat, weight_format, "--weights"),
        utilisation=utilisation,
    )


def known_format(formats: type[_Format], name: str, flag: str) -> _Format:
    """Raises PlanError listing the formats when none has that name."""
    names = [each.value for each in formats]
    if name not in names:
        raise PlanError(f"{flag} {name!r} is not known; known: {', '.join(names)}")
    return formats(name)
