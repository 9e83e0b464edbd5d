"""What the step loop asks of whoever computes: the only door between scheduling and tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rempart_engine.core.step import StepPlan, StepResult


class PendingStep(Protocol):
    """A plan that was launched."""

    @property
    def is_done(self) -> bool:
        """`result` does not wait."""
        ...

    def result(self) -> StepResult:
        """Wait until the plan is computed."""
        ...


@dataclass(frozen=True, slots=True)
class DoneStep:
    """Of a runner that computes while it launches; or a step that was lost."""

    outcome: StepResult
    is_done: bool = True

    def result(self) -> StepResult:
        return self.outcome


class Runner(Protocol):
    """Computes plans, in order, and keeps the rows that they build on."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Have the plan computed; the result holds one entry per row of the plan, in its order.

        A row that fails alone is reported in its `RowResult.error`; a step for which memory does not suffice is lost
        and done at once, and its new rows are to be released all the same; an exception, here or from the result, means
        that the runner can no longer be trusted.
        Plans that were made before the scheduler heard of a failure, an end or an abort still name the row: whatever is
        computed for it then is dropped. Drafts never leave the runner: plans and results only count them.
        """
        ...

    def release_rows(self, rows: Sequence[int]) -> None:
        """Forget rows whose sequences ended or were preempted; a later plan may name them again in `new_rows`."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner that is ready to compute, with the facts about its model that scheduling and callers need."""

    runner: Runner
    model_name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """Most tokens of one sequence: prompt and output together."""
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    """KV blocks that the runner's storage holds; block ids are 0 .. num_blocks - 1."""
    dtype: str
    """What it computes in, for people: "float32", "bfloat16", "int8"."""
    num_mtp_layers: int = 0
    """Layers that predict tokens beyond the next one (multi-token prediction): with none it cannot propose drafts."""
