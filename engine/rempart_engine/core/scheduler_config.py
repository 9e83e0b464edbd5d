"""Limits that the scheduler keeps."""

from dataclasses import dataclass

MAX_SPECULATIVE_TOKENS = 3
"""Drafts beyond the third are accepted too rarely to pay for their computation."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Fixed at start.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    num_blocks: int
    """KV blocks of the pool; their ids are 0 .. num_blocks - 1."""
    max_num_rows: int
    """Most sequences in the running set."""
    max_step_tokens: int
    """Token budget of one step. At least 2, so that decoding and prefill can both have a share."""
    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    max_num_waiting: int
    """Most choices that may wait; a request that would exceed it is refused."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    block_size: int = 64
    """Tokens per KV block."""
    watermark: float = 0.01
    """Fraction of the pool that admission leaves free, so that the running set can grow before it must preempt."""
    enable_prefix_cache: bool = True
    num_speculative_tokens: int = 0
    """Most draft tokens that a row verifies in a step; 0 switches speculation off."""
    max_speculative_rows: int = 16
    """With more sequences than this in the running set, no drafts are verified or proposed."""

    def __post_init__(self) -> None:
        for name, number, least in (
            ("num_blocks", self.num_blocks, 1),
            ("max_num_rows", self.max_num_rows, 1),
            ("max_step_tokens", self.max_step_tokens, 2),
            ("max_model_len", self.max_model_len, 2),
            ("max_num_waiting", self.max_num_waiting, 1),
            ("vocab_size", self.vocab_size, 1),
            ("block_size", self.block_size, 1),
            ("num_speculative_tokens", self.num_speculative_tokens, 0),
            ("max_speculative_rows", self.max_speculative_rows, 1),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if self.num_speculative_tokens > MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, got {self.num_speculative_tokens}"
            )
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark must be at least 0 and less than 1, got {self.watermark:g}")

    @property
    def num_pool_tokens(self) -> int:
        """Tokens that all KV blocks together can hold."""
        return self.num_blocks * self.block_size

    @property
    def max_sequence_tokens(self) -> int:
        """Length at which every sequence ends: the model's limit, or the whole pool if that is less."""
        return min(self.max_model_len, self.num_pool_tokens)

    @property
    def num_watermark_blocks(self) -> int:
        """KV blocks that admission leaves free."""
        return int(self.watermark * self.num_blocks)
