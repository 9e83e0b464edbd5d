"""Who waits for a row and KV blocks, and who of them is next."""

from rempart_engine.core.integrity import IntegrityError
from rempart_engine.core.removable_heap import RemovableHeap
from rempart_engine.core.request import RequestId
from rempart_engine.core.sequence import Order, Sequence, SequenceState


class WaitingQueue:
    """Sequences by priority, then arrival. A preempted one comes back ahead of all that arrived after it.

    Siblings of a choice that has yet to compute their common prompt are parked: they wait, but are never next.
    """

    def __init__(self) -> None:
        self._heap: RemovableHeap[Order, Sequence] = RemovableHeap()
        self._parked: dict[RequestId, dict[int, Sequence]] = {}
        self._num_parked = 0
        self.num_tokens = 0
        """Known tokens of the sequences that are not parked."""

    def __len__(self) -> int:
        """All that wait, parked or not."""
        return len(self._heap) + self._num_parked

    def first(self) -> Sequence | None:
        """The next one, left in place."""
        entry = self._heap.first()
        return None if entry is None else entry[1]

    def push(self, sequence: Sequence) -> None:
        """It waits for its turn from now on."""
        sequence.state = SequenceState.WAITING
        self._heap.push(sequence.order, sequence)
        self.num_tokens += len(sequence.token_ids)

    def park(self, siblings: list[Sequence]) -> None:
        """Choices 1 .. n - 1 of a request wait for `unpark`."""
        for sibling in siblings:
            sibling.state = SequenceState.PARKED
            self._parked.setdefault(sibling.request.request_id, {})[sibling.choice] = sibling
            self._num_parked += 1

    def unpark(self, request_id: RequestId) -> None:
        """Siblings parked for this request, if any, wait for their turn."""
        siblings = self._parked.pop(request_id, {})
        self._num_parked -= len(siblings)
        for sibling in siblings.values():
            self.push(sibling)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, parked or not."""
        if sequence.state is SequenceState.WAITING:
            self._heap.remove(sequence.order)
            self.num_tokens -= len(sequence.token_ids)
            return
        siblings = self._parked[sequence.request.request_id]
        del siblings[sequence.choice]
        self._num_parked -= 1
        if not siblings:
            del self._parked[sequence.request.request_id]

    def check_integrity(self, waiting: list[Sequence]) -> None:
        """Raises IntegrityError unless it holds exactly the given sequences, each with nothing of the running set."""
        parked = sum(sequence.state is SequenceState.PARKED for sequence in waiting)
        queued = [sequence for sequence in waiting if sequence.state is SequenceState.WAITING]
        if (parked, len(queued)) != (self._num_parked, len(self._heap)):
            raise IntegrityError(f"{self._num_parked} parked and {len(self._heap)} queued of {len(waiting)} that wait")
        if self.num_tokens != sum(len(sequence.token_ids) for sequence in queued):
            raise IntegrityError(f"{self.num_tokens} waiting tokens do not match the queue")
        for sequence in waiting:
            if sequence.row is not None or sequence.block_ids or sequence.num_scheduled_tokens:
                raise IntegrityError(f"{sequence!r} waits, but holds a row, blocks or computed tokens")
