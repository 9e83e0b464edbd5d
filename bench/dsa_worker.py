"""Times one layer's attention with one kind of cache, in a process of its own; `dsa.py` starts it.

    python bench/dsa_worker.py --cache bfloat16 --contexts 2048 131072 --batches 1 16 --rounds 5
    stdout  JSON lines: {"arithmetic": ...}, then {"kind": "kernels" or "layer", "context": ..., "batch": ...,
            "seconds": {"dense": [...], "sparse": [...], ...}}, or {"wrong": "..."} and nothing more

All ways are run in turn, round after round, after a first time that is not measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

import torch
from bench.dsa_caches import Caches, fill_caches, new_tokens
from bench.dsa_check import WrongAnswerError, check, check_sketch
from bench.dsa_contestants import TorchSketch, choose, dense, sparse
from bench.dsa_layer import Layers, check_layers, hidden_states
from bench.dsa_points import CACHES, Case

from rempart_engine.kernels.cpu_tiles import has_bfloat16_dot

_LEAST_S = 0.5
"""Rounds go on until they took this long together, so that short ones have more."""
_MOST_ROUNDS = 50

Contestants = Mapping[str, Callable[[], object]]


def alternate(contestants: Contestants, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each, by name; at least so many rounds."""
    for work in contestants.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        if number >= num_rounds and time.perf_counter() - began >= _LEAST_S:
            break
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def time_kernels(case: Case, caches: Caches, num_rounds: int) -> dict[str, list[float]]:
    """Attention alone; of one sequence also in plain torch, where torch computes in the cache's format.

    Raises:
        WrongAnswerError: one computes wrong.
    """
    new = new_tokens(caches, [(case.context, 1)] * case.batch)
    check(case, caches, new)
    contestants: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(caches, new),
        "sparse": lambda: sparse(caches, new),
    }
    if case.batch == 1 and case.cache != "fp8":
        sketch = TorchSketch(caches, new)
        check_sketch(case, caches, new, sketch)
        contestants |= {"torch dense": sketch.dense, "torch sparse": sketch.sparse}
    return alternate(contestants, num_rounds)


def time_layers(case: Case, caches: Caches, layers: Layers, num_rounds: int) -> dict[str, list[float]]:
    """Attention with its projections; of the sparse one also what its kernels take, and choosing alone.

    Raises:
        WrongAnswerError: one computes wrong.
    """
    new = new_tokens(caches, [(case.context, 1)] * case.batch)
    step, x = new.step, hidden_states(case.batch, caches.dtype)
    check_layers(case, layers.dense(x, caches, step), layers.sparse(x, caches, step))
    contestants = {
        "dense": lambda: layers.dense(x, caches, step),
        "sparse": lambda: layers.sparse(x, caches, step),
        "sparse kernels": lambda: sparse(caches, new),
        "choosing": lambda: choose(caches, new),
    }
    return alternate(contestants, num_rounds)


def measure(args: argparse.Namespace) -> Iterator[Mapping[str, object]]:
    """What is to be said, line by line."""
    caches = fill_caches(args.cache, max(args.contexts) * max(args.batches))
    in_pairs = has_bfloat16_dot() and caches.dtype == torch.bfloat16
    yield {"arithmetic": "bfloat16 dot products (AVX-512 BF16)" if in_pairs else "float32 multiply-adds"}
    cases = [Case(args.cache, context, batch) for context in args.contexts for batch in args.batches]
    for case in cases:
        yield _line("kernels", case, time_kernels(case, caches, args.rounds))
    layers = Layers(caches.dtype)
    yield {"weight_bytes": layers.weight_bytes}
    for case in cases:
        if case.batch in (min(args.batches), max(args.batches)):
            yield _line("layer", case, time_layers(case, caches, layers, args.rounds))


def _line(kind: str, case: Case, seconds: Mapping[str, Sequence[float]]) -> dict[str, object]:
    return {"kind": kind, "context": case.context, "batch": case.batch, "seconds": seconds}


def main() -> None:
    """Measures and says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", choices=CACHES, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", required=True)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    try:
        with torch.inference_mode():
            for line in measure(args):
                print(json.dumps(line), flush=True)
    except WrongAnswerError as error:
        print(json.dumps({"wrong": str(error)}), flush=True)


if __name__ == "__main__":
    main()
