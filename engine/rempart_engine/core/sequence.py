"""One growing token list: what of it is known, what is computed, and what is on its way."""

from enum import Enum

from rempart_engine.core.integrity import IntegrityError
from rempart_engine.core.request import FinishReason, Request
from rempart_engine.core.step import TokenLogprob

Order = tuple[int, int, int]
"""Who goes first: (-priority, arrival, choice), least first."""


class SequenceState(Enum):
    """Where a sequence stands."""

    PARKED = "parked"
    """Until choice 0 of its request has computed the prompt, to find it in the prefix cache."""
    WAITING = "waiting"
    """Holds neither row nor KV blocks."""
    RUNNING = "running"
    ENDED = "ended"
    """Its last event is out. It keeps row and blocks as long as steps that write into them are in flight."""


class Sequence:
    """Mutable state of one choice of a request; its one owner is the scheduler.

        |<-- num_computed_tokens -->|<-- num_in_flight_tokens -->|<-- num_remaining_tokens -->|
        |<------------------- token_ids ------------------->|<------- num_placeholders ------>|

    Tokens are computed in order. In-flight tokens belong to plans whose results are not committed. Placeholders stand
    for tokens that plans in flight will sample: they count as tokens, can be scheduled, but their ids are not known.

    Drafts are guesses at the tokens to come, known to the runner alone. They do not count as tokens. Once they are in
    flight, nobody knows how many tokens that step will bring, so nothing more can be scheduled before it is committed.
    """

    def __init__(
        self,
        request: Request,
        choice: int,
        arrival: int,
        stop_token_ids: frozenset[int],
        max_sequence_tokens: int,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.choice = choice
        self.arrival = arrival
        self.order: Order = (-request.priority, arrival, choice)
        self.state = SequenceState.WAITING

        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids) - request.num_emitted_tokens
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        self.num_in_flight_steps = 0
        self.num_placeholders = 0
        self.num_ready_drafts = 0
        """Drafts that the runner holds for its next step."""
        self.num_in_flight_drafts = 0
        self.awaits_drafts = False
        """The step in flight may propose some."""
        self.last_step = 0
        """Number of the last plan that had work of this sequence."""

        self.row: int | None = None
        self.block_ids: list[int] = []
        self.block_digests: list[bytes] = []
        """Of full blocks of known tokens, as far as they were needed."""
        self.num_cached_blocks = 0
        """Leading blocks that were offered to the prefix cache, or came from it."""
        self.num_cached_tokens = 0
        """Prompt tokens that came from the prefix cache when the sequence first ran."""

        self.stop_token_ids = stop_token_ids
        most = max_sequence_tokens
        if sampling.max_tokens is not None:
            most = min(most, self.num_prompt_tokens + sampling.max_tokens)
        self.max_num_tokens = most
        """Length at which it ends."""
        self.prompt_logprobs: list[TokenLogprob] = []
        """Collected until the first event takes them along."""
        self.wants_prompt_logprobs = (
            sampling.prompt_logprobs is not None and choice == 0 and request.num_emitted_tokens == 0
        )
        self.has_run = False
        self.has_emitted = False
        self.is_preempting = False
        """To be preempted as soon as nothing of it is in flight."""
        self.is_lost = False
        """A step of it was lost: it must be preempted, and what later steps in flight bring is void."""
        self.is_distrusted = False
        """A step failed on it: what its KV blocks hold must not be found by others."""

    def __repr__(self) -> str:
        return f"<Sequence {self.request.request_id}/{self.choice} {self.state.value}>"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens, with those that were emitted elsewhere."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_scheduled_tokens(self) -> int:
        """Computed or in flight: where the next work starts."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that could be scheduled now.

        None while the last token it may have is only a placeholder, drafts are in flight, or some may be proposed: a
        step that verifies them brings more than one that is launched sooner.
        """
        num_tokens = len(self.token_ids) + self.num_placeholders
        if num_tokens >= self.max_num_tokens or self.num_in_flight_drafts or self.awaits_drafts:
            return 0
        return num_tokens - self.num_computed_tokens - self.num_in_flight_tokens

    @property
    def is_in_flight(self) -> bool:
        return self.num_in_flight_steps > 0

    def schedule(self, num_new_tokens: int, step: int, num_drafts: int = 0, max_drafts: int = 0) -> bool:
        """Put the next tokens in flight, and with them some of the drafts; the other drafts are void.

        Up to `max_drafts` may be proposed after it.

        True when that reaches the last token, so that one is sampled after it.
        """
        self.num_in_flight_tokens += num_new_tokens
        self.num_in_flight_steps += 1
        self.num_in_flight_drafts = num_drafts
        self.awaits_drafts = max_drafts > 0
        self.num_ready_drafts = 0
        self.last_step = step
        samples = self.num_scheduled_tokens == self.num_tokens
        self.num_placeholders += samples
        return samples

    def land(self, num_new_tokens: int, *, samples: bool) -> None:
        """The oldest work in flight is done: its tokens are computed, and what it sampled is about to be appended.

        Its drafts are no longer in flight: those that became tokens come with `append`.
        """
        self.num_in_flight_drafts = 0  # they fly in the only step in flight
        self.awaits_drafts = self.awaits_drafts and self.num_in_flight_steps > 1
        self.num_in_flight_tokens -= num_new_tokens
        self.num_in_flight_steps -= 1
        self.num_computed_tokens += num_new_tokens
        self.num_placeholders -= samples

    def lose(self, num_new_tokens: int, *, samples: bool) -> None:
        """The oldest work in flight was not done."""
        self.land(num_new_tokens, samples=samples)
        self.num_computed_tokens -= num_new_tokens
        self.is_lost = self.is_preempting = True

    def append(self, token_ids: tuple[int, ...]) -> tuple[int, FinishReason | None]:
        """Take sampled tokens up to the one that ends the sequence: how many were taken, and the reason if it ended.

        All but the last of them were drafts in the step that sampled them, so they are computed.
        """
        num_known = len(self.token_ids)
        reason = None
        for token_id in token_ids:
            self.token_ids.append(token_id)
            reason = self.finish_reason()
            if reason is not None:
                break
        count = len(self.token_ids) - num_known
        self.num_computed_tokens += max(0, count - 1)
        return count, reason

    def finish_reason(self) -> FinishReason | None:
        """Whether the last token, an output token, ends the sequence."""
        if self.token_ids[-1] in self.stop_token_ids and self.num_output_tokens > self.request.sampling.min_tokens:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None

    def mark_emitted(self) -> None:
        """Its first event is out, and what goes only with the first."""
        self.has_emitted = True
        self.wants_prompt_logprobs = False
        self.prompt_logprobs.clear()

    def reset(self) -> None:
        """Forget what was computed; tokens stay. Nothing may be in flight."""
        assert not self.is_in_flight, "reset with work in flight"
        self.num_computed_tokens = 0
        self.num_ready_drafts = 0
        self.num_cached_blocks = 0
        self.is_preempting = False
        self.is_lost = False
        self.prompt_logprobs.clear()

    def check_integrity(self, block_size: int, num_in_flight_tokens: int, num_in_flight_drafts: int = 0) -> None:
        """Raises IntegrityError when its counts contradict each other, or what all plans in flight hold of it."""
        holds_work = (
            self.num_in_flight_tokens == num_in_flight_tokens
            and self.is_in_flight == (num_in_flight_tokens > 0)
            and self.num_in_flight_drafts == num_in_flight_drafts
            and self.num_scheduled_tokens + num_in_flight_drafts <= len(self.block_ids) * block_size
            and self.num_cached_blocks * block_size <= self.num_computed_tokens
        )
        holds_tokens = self.state is SequenceState.ENDED or (  # an ended one takes no more tokens from what lands
            0 <= self.num_placeholders <= self.num_in_flight_steps
            and self.num_scheduled_tokens <= self.num_tokens
            and self.num_computed_tokens <= len(self.token_ids)
            and not (self.num_ready_drafts and (self.is_in_flight or self.state is not SequenceState.RUNNING))
            and not (self.num_in_flight_drafts and self.num_in_flight_steps > 1)
        )
        if not (holds_work and holds_tokens):
            raise IntegrityError(f"{self!r}: {vars(self)}")
