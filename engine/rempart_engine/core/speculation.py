"""How many draft tokens a sequence may have: to verify in a step, and to propose after it.

Drafts never change what a sequence says (docs/adr/0006), so all that is decided here is what they may cost: none are
made that no later step could use, and nobody gives way for them.
"""

from rempart_engine.core.scheduler_config import SchedulerConfig
from rempart_engine.core.sequence import Sequence


def drafts_per_row(config: SchedulerConfig, num_running: int) -> int:
    """Most drafts of a row in a step with so many running sequences.

    Drafts fill computation that a small batch leaves idle; a large one leaves none.
    """
    return config.num_speculative_tokens if num_running <= config.max_speculative_rows else 0


def num_usable_drafts(sequence: Sequence, limit: int) -> int:
    """How many of the drafts that are ready for it are worth verifying now.

    One token follows the last draft in any case, so drafts beyond the last but one that it may have are useless.
    """
    return max(0, min(sequence.num_ready_drafts, limit, sequence.max_num_tokens - 1 - sequence.num_tokens))


def num_useful_drafts(sequence: Sequence, num_new_tokens: int, limit: int) -> int:
    """How many drafts are worth proposing after it computes so many tokens (drafts to verify not counted).

    None where its next tokens must be known one by one: penalties count each token before the next is sampled, and
    min_tokens allow endings from a certain token on.
    """
    sampling = sequence.request.sampling
    if num_new_tokens < sequence.num_remaining_tokens or sampling.has_penalties:
        return 0
    num_tokens = sequence.num_tokens + 1  # with the one that is sampled
    if num_tokens - sequence.num_prompt_tokens < sampling.min_tokens:
        return 0
    return max(0, min(limit, sequence.max_num_tokens - 1 - num_tokens))
