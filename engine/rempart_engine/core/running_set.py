"""Who runs, with which row and KV blocks; who may join, and who gives way when blocks run out."""

from bisect import insort
from typing import NamedTuple

from rempart_engine.core.block_tables import BlockTables
from rempart_engine.core.integrity import IntegrityError
from rempart_engine.core.row_pool import RowPool
from rempart_engine.core.scheduler_config import SchedulerConfig
from rempart_engine.core.sequence import Sequence, SequenceState
from rempart_engine.core.waiting_queue import WaitingQueue


class DraftRoom(NamedTuple):
    """How many drafts a sequence may verify in a step and propose after it, and the blocks it was given for them."""

    new_block_ids: tuple[int, ...]
    num_drafts: int
    max_drafts: int


_NO_DRAFT_ROOM = DraftRoom((), 0, 0)


class RunningSet:
    """Sequences that hold a row and KV blocks: the running, and the ended that steps in flight still write into.

    Row and blocks of a sequence come back only when nothing of it is in flight.
    """

    def __init__(self, config: SchedulerConfig, waiting: WaitingQueue) -> None:
        self._waiting = waiting
        self._num_watermark_blocks = config.num_watermark_blocks
        self._ended_in_flight: set[Sequence] = set()
        self.sequences: list[Sequence] = []
        """The running, in order."""
        self.rows = RowPool(config.max_num_rows)
        self.tables = BlockTables(config.num_blocks, config.block_size, enable_prefix_cache=config.enable_prefix_cache)
        self.num_preemptions = 0

    def next_admission(self) -> tuple[Sequence, list[int]] | None:
        """First waiting sequence and its cached blocks, if it can run now. No other passes it, or it might never run.

        A watermark of blocks stays free for the running to grow into; with none running it has no purpose.
        """
        sequence = self._waiting.first()
        if sequence is None or self.rows.num_free == 0 or self.tables.num_free == 0:
            return None
        matched = self.tables.match(sequence)
        num_kept_free = self._num_watermark_blocks if self.sequences else 0
        return (sequence, matched) if self.tables.can_admit(sequence, matched, num_kept_free) else None

    def admit(self, sequence: Sequence, matched: list[int]) -> int:
        """Move it from waiting to running; returns its row."""
        self._waiting.remove(sequence)
        self.tables.admit(sequence, matched)
        sequence.state = SequenceState.RUNNING
        sequence.row = row = self.rows.acquire()
        insort(self.sequences, sequence, key=lambda running: running.order)
        return row

    def grow(self, sequence: Sequence, num_new_tokens: int) -> tuple[int, ...] | None:
        """New blocks to compute so many tokens. None: it cannot have them now, or had to give way itself."""
        num_lacking = max(0, self.tables.num_lacking(sequence, num_new_tokens))
        return self.tables.grow(sequence, num_lacking) if self._make_room(sequence, num_lacking) else None

    def room_for_drafts(self, sequence: Sequence, num_new_tokens: int, num_drafts: int, max_drafts: int) -> DraftRoom:
        """Room to verify drafts beside new tokens, whose blocks it has, and then to propose others.

        One free block stays for each running sequence: it may lack one for its next token, and drafts are no reason to
        preempt it. What has no room is dropped.
        """
        if not num_drafts and not max_drafts:
            return _NO_DRAFT_ROOM
        num_lacking = self.tables.num_lacking(sequence, num_new_tokens + num_drafts + max(0, max_drafts - 1))
        num_spared = self.tables.num_free - len(self.sequences)
        new_block_ids = self.tables.grow(sequence, max(0, min(num_lacking, num_spared)))
        room = self.tables.num_spare_tokens(sequence) - num_new_tokens
        num_drafts = min(num_drafts, room)
        # The first draft is proposed from the last token: only those after it write KV that is not there yet.
        return DraftRoom(new_block_ids, num_drafts, min(max_drafts, room - num_drafts + 1))

    def preempt(self, sequence: Sequence) -> None:
        """Move it from running to waiting; it keeps its tokens and computes them again later."""
        self.sequences.remove(sequence)
        self._release(sequence)
        sequence.reset()
        self._waiting.push(sequence)
        self.num_preemptions += 1

    def end(self, sequence: Sequence) -> None:
        """It runs no more; row and blocks come back now, or when `land` finds nothing in flight."""
        self.sequences.remove(sequence)
        sequence.is_preempting = False
        if sequence.is_in_flight:
            self._ended_in_flight.add(sequence)
        else:
            self._release(sequence)

    def land(self, sequence: Sequence) -> None:
        """A step of it was committed: what waited for the last of them happens now."""
        if sequence.is_in_flight:
            return
        if sequence in self._ended_in_flight:
            self._ended_in_flight.remove(sequence)
            self._release(sequence)
        elif sequence.is_preempting:
            self.preempt(sequence)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raises IntegrityError unless it holds exactly the given running sequences, and rows and blocks add up."""
        if self.sequences != sorted(running, key=lambda sequence: sequence.order):
            raise IntegrityError(f"{self.sequences} are in the running set, {running} run")
        if any(not sequence.is_in_flight for sequence in self._ended_in_flight):
            raise IntegrityError("a sequence ended and landed, but still holds its blocks")
        holders = [*self.sequences, *self._ended_in_flight]
        self.rows.check_integrity([sequence.row for sequence in holders if sequence.row is not None])
        self.tables.check_integrity(holders)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Preempt, last in order first, until `count` blocks are free; False when that cannot be now."""
        while self.tables.num_free < count:
            if self._ended_in_flight:
                return False  # their blocks are on the way back
            victim = self.sequences[-1]
            if victim.is_in_flight:
                victim.is_preempting = True
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None, "a running sequence has a row"
        self.rows.release(sequence.row)
        sequence.row = None
        self.tables.release(sequence)
