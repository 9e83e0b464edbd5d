"""A step plan in the making."""

from rempart_engine.core.sequence import Sequence
from rempart_engine.core.step import NewRow, ScheduledRow, StepPlan


class PlanDraft:
    """Collects the rows of one plan and puts their work in flight. One sequence is planned at most once."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._new_rows: list[NewRow] = []
        self._rows: list[ScheduledRow] = []
        self.sequences: list[Sequence] = []
        """Those of the planned rows, in their order."""

    def introduce(self, sequence: Sequence, row: int) -> None:
        """The runner meets the sequence in this plan, with its block table as it is."""
        self._new_rows.append(
            NewRow(
                row=row,
                token_ids=tuple(sequence.token_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                sampling=sequence.request.sampling,
                choice=sequence.choice,
                block_ids=tuple(sequence.block_ids),
            )
        )

    def plan(
        self,
        sequence: Sequence,
        num_new_tokens: int,
        new_block_ids: tuple[int, ...] = (),
        num_drafts: int = 0,
        max_drafts: int = 0,
    ) -> None:
        """Compute the next tokens of a running sequence and some of its drafts, and propose others.

        Its table just grew by `new_block_ids`.
        """
        assert sequence.row is not None, "a running sequence has a row"
        start = sequence.num_scheduled_tokens
        wants_prompt_logprobs = sequence.wants_prompt_logprobs and start < sequence.num_prompt_tokens - 1
        samples = sequence.schedule(num_new_tokens, self._step, num_drafts, max_drafts)
        self.sequences.append(sequence)
        self._rows.append(
            ScheduledRow(
                row=sequence.row,
                start=start,
                num_new_tokens=num_new_tokens + num_drafts,
                new_block_ids=new_block_ids,
                samples=samples,
                wants_prompt_logprobs=wants_prompt_logprobs,
                num_draft_tokens=num_drafts,
                max_drafts=max_drafts,
            )
        )

    def finish(self) -> StepPlan | None:
        """The plan; None when it would be empty."""
        return StepPlan(self._step, tuple(self._new_rows), tuple(self._rows)) if self._rows else None
