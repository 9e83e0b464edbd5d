"""How long a GPU takes: CUDA events around a graph, the L2 cache emptied before each time."""

from collections.abc import Callable
from dataclasses import replace

import torch
from bench.dsa_check import WrongAnswerError
from bench.gpu_points import NOT_TIMED, Measured, Point

_FLUSH_BYTES = 256 << 20
"""More than the L2 cache of any GPU; writing them also gives Python time to launch what comes next."""
_MOST_REPEATS = 50
_LEAST_REPEATS = 3

Timer = Callable[[Callable[[], object], float], tuple[float, ...]]
"""What is to be timed, and for about how many seconds at most, to the seconds of each time."""


class EventTimer:
    """Times work on the current CUDA device."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[], object], at_most_s: float) -> tuple[float, ...]:
        first = self._once(work)
        number = max(_LEAST_REPEATS, min(_MOST_REPEATS, int(at_most_s / max(first, 1e-6))))
        return tuple(self._once(work) for _ in range(number))

    def _once(self, work: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


def measure(point: Point, timer: Timer | None, at_most_s: float = 0.3) -> Measured:
    """Checks, then times with and without a graph, or without a timer only checks. What goes wrong is a refusal."""
    found = Measured(point.group, point.name, point.works, point.aim)
    try:
        point.check(point.run())
        if timer is None:
            return replace(found, refusal=NOT_TIMED)
        launched = timer(point.run, at_most_s)
        graph, result, why_not = _captured(point.run)
        if graph is None:
            return replace(found, seconds=launched, launched_seconds=launched, not_in_graph=why_not)
        seconds = timer(graph.replay, at_most_s)
        point.check(result)
        return replace(found, seconds=seconds, launched_seconds=launched)
    except WrongAnswerError as error:
        return replace(found, refusal=f"wrong: {error}")
    except Exception as error:  # a kernel that cannot be launched must not hide the others' numbers
        return replace(found, refusal=_first_line(error))


def _captured(run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph | None, object, str]:
    """A graph of what `run` launches and where its result will lie, or why there is none."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # whatever waits for the GPU cannot be captured, and says so in many ways
        return None, None, _first_line(error)
    return graph, result, ""


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
