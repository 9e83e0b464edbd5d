"""Which requests have not ended, and which of them have run out of time."""

from rempart_engine.core.removable_heap import RemovableHeap
from rempart_engine.core.request import RequestId
from rempart_engine.core.sequence import Sequence


class OpenRequests:
    """Requests with their live choices; a request closes with its last one."""

    def __init__(self) -> None:
        self._live: dict[RequestId, dict[int, Sequence]] = {}
        self._deadlines: RemovableHeap[tuple[float, int], RequestId] = RemovableHeap()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._live

    def sequences(self) -> list[Sequence]:
        """All live choices of all requests."""
        return [sequence for live in self._live.values() for sequence in live.values()]

    def live(self, request_id: RequestId) -> list[Sequence]:
        """Live choices of one request, in order; none when it is not open."""
        return list(self._live.get(request_id, {}).values())

    def open(self, sequences: list[Sequence]) -> None:
        """Start a request with all its choices."""
        request = sequences[0].request
        self._live[request.request_id] = {sequence.choice: sequence for sequence in sequences}
        if request.deadline is not None:
            self._deadlines.push((request.deadline, sequences[0].arrival), request.request_id)

    def end(self, sequence: Sequence) -> None:
        """One choice has ended."""
        request = sequence.request
        live = self._live[request.request_id]
        del live[sequence.choice]
        if not live:
            del self._live[request.request_id]
            if request.deadline is not None:
                self._deadlines.remove((request.deadline, sequence.arrival))

    def first_expired(self, now: float) -> RequestId | None:
        """Open request with the earliest deadline, if that is at or before `now`."""
        entry = self._deadlines.first()
        return entry[1] if entry is not None and entry[0][0] <= now else None
