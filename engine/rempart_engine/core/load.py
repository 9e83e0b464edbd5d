"""How busy the scheduler is, and what it has done so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rempart_engine.core.request import FinishReason


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since start; they only grow."""

    num_preemptions: int
    num_prefix_cache_query_tokens: int
    """Tokens of admitted sequences that could have come from the prefix cache."""
    num_prefix_cache_hit_tokens: int
    """Those of them that did."""
    num_scheduled_tokens: int
    num_output_tokens: int
    num_draft_tokens: int
    """Draft tokens that were verified."""
    num_accepted_draft_tokens: int
    """Those of them that became output."""
    num_finished: Mapping[FinishReason, int]
    """Ended choices by reason; refused requests count as ERROR, once each."""


@dataclass(frozen=True, slots=True)
class Load:
    """State at one moment."""

    num_waiting: int
    """Choices that wait for their first or a further step, without KV blocks."""
    num_running: int
    """Choices that hold KV blocks."""
    num_waiting_tokens: int
    """Tokens still to be prefilled, of waiting and running choices."""
    num_free_blocks: int
    """KV blocks that no sequence holds; cached ones among them can be evicted and count as free."""
    num_blocks: int
    num_steps: int
    """Steps committed since start."""
    counters: Counters


@dataclass(slots=True)
class Tally:
    """The growing side of `Counters`; its one owner is the scheduler."""

    num_prefix_cache_query_tokens: int = 0
    num_prefix_cache_hit_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_output_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))

    def snapshot(self, num_preemptions: int) -> Counters:
        """The totals at this moment, as a value; preemptions are counted where they happen."""
        return Counters(
            num_preemptions=num_preemptions,
            num_prefix_cache_query_tokens=self.num_prefix_cache_query_tokens,
            num_prefix_cache_hit_tokens=self.num_prefix_cache_hit_tokens,
            num_scheduled_tokens=self.num_scheduled_tokens,
            num_output_tokens=self.num_output_tokens,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_draft_tokens=self.num_accepted_draft_tokens,
            num_finished=dict(self.num_finished),
        )
