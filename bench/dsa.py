"""Dense against sparse attention of one DeepSeek-V3.2 layer, decoding at its true shape on this machine's CPU.

    python bench/dsa.py [--quick] [--caches bfloat16 fp8] [--json FILE]

Dense is the attention kernel over everything; sparse is all that a layer does: it stores index keys, scores, chooses,
and attends to what was chosen. Both read through block tables, and take turns. No speed without a right answer: see
`dsa_check.py`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

from bench.contender_process import measure_limits
from bench.dsa_points import CACHES, Cache, Case, Work, dense_work, score_matrix_bytes, short, sparse_work
from bench.points import Limits
from bench.report import describe, table, this_machine, versions, write_json

from rempart_engine.core_client import core_environ
from rempart_engine.model.deepseek.options import AttentionOptions

_CONTEXTS, _QUICK_CONTEXTS = (2048, 8192, 32_768, 131_072), (2048, 8192)
_BATCHES, _QUICK_BATCHES = (1, 4, 16), (1, 4)
_PROMPT_CONTEXTS = (32_768, 131_072)
_PROMPT_CHUNK = 512
"""Tokens that a step computes at most by default."""

Seconds = Mapping[str, Sequence[float]]


class NoAnswerError(Exception):
    """A process that measures computes wrong, or ends."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """All rounds of one cache format."""

    cache: Cache
    arithmetic: str
    weight_bytes: int
    """Of the whole layer's projections."""
    kernels: Mapping[Case, Seconds] = field(default_factory=dict)
    layers: Mapping[Case, Seconds] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptMemory:
    """Growth of memory for a chunk of a prompt."""

    context: int
    select_bytes: int
    attend_bytes: int


def measure(cache: Cache, contexts: Sequence[int], batches: Sequence[int], num_rounds: int) -> Measurement:
    """All cases with one cache format, in a process that waits as an engine's does.

    Raises:
        NoAnswerError: it computes wrong.
    """
    numbers = {"--contexts": contexts, "--batches": batches, "--rounds": (num_rounds,)}
    args = ["--cache", cache, *(str(part) for name, values in numbers.items() for part in (name, *values))]
    found: dict[str, Any] = {}
    timed: dict[str, dict[Case, Seconds]] = {"kernels": {}, "layer": {}}
    for line in _lines("dsa_worker.py", args):
        if "wrong" in line:
            raise NoAnswerError(line["wrong"])
        if "kind" not in line:
            found |= line
            continue
        case = Case(cache, line["context"], line["batch"])
        timed[line["kind"]][case] = line["seconds"]
        _note(f"{cache}, {line['kind']}, {case.name}: {ratio(line['seconds']):.2f}")
    return Measurement(cache, found["arithmetic"], found["weight_bytes"], timed["kernels"], timed["layer"])


def measure_memory(context: int) -> PromptMemory:
    """A chunk of a prompt at the end of this context.

    Raises:
        NoAnswerError: the process ends without an answer.
    """
    (line,) = _lines("dsa_memory.py", ["--context", str(context), "--queries", str(_PROMPT_CHUNK)])
    _note(f"memory at {short(context)} is measured")
    return PromptMemory(context, **line)


def can_measure_memory() -> bool:
    """Whether a process here can forget its peak: Linux alone."""
    return Path("/proc/self/clear_refs").exists()


def _lines(script: str, args: Sequence[str]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-P", str(Path(__file__).with_name(script)), *args]
    environ = core_environ(os.environ, this_machine().cores)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None, "opened as a pipe"
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise NoAnswerError(f"{script} ended with {process.returncode}")


def ratio(seconds: Seconds) -> float:
    """How many times faster sparse is, by medians."""
    return median(seconds["dense"]) / median(seconds["sparse"])


def kernels_table(result: Measurement, limits: Limits) -> str:
    """Times of attention alone, and what they amount to."""
    head = ["context x batch", "dense ms", "sparse ms", "dense / sparse", "by FLOP"]
    head += ["GFLOP", "MB read", "GFLOP/s", "GB/s", "of GEMM", "of memory", "torch dense ms", "torch sparse ms"]
    rows = []
    for case, seconds in result.kernels.items():
        works = {"dense": dense_work(case), "sparse": sparse_work(case)}
        times = {name: median(of_name) for name, of_name in seconds.items()}
        rates = [(work.flop / times[name], work.read_bytes / times[name]) for name, work in works.items()]
        rows.append(
            [
                case.name,
                _ms(seconds["dense"]),
                _ms(seconds["sparse"]),
                f"{ratio(seconds):.2f}",
                f"{works['dense'].flop / works['sparse'].flop:.2f}",
                _both(f"{work.flop / 1e9:,.2f}" for work in works.values()),
                _both(f"{work.read_bytes / 1e6:,.1f}" for work in works.values()),
                _both(f"{flop / 1e9:,.0f}" for flop, _ in rates),
                _both(f"{read / 1e9:.1f}" for _, read in rates),
                _both(f"{flop / limits.gemm_flop_per_s:.0%}" for flop, _ in rates),
                _both(f"{read / limits.stream_bytes_per_s:.0%}" for _, read in rates),
                *(_ms(seconds[name]) if name in seconds else "" for name in ("torch dense", "torch sparse")),
            ]
        )
    return table(head, rows)


def layers_table(result: Measurement) -> str:
    """Times of the layer with its projections, and where the time of the sparse one goes."""
    head = ["context x batch", "dense ms", "sparse ms", "dense / sparse"]
    head += ["of sparse: projections", "choosing", "attending", "most is"]
    rows = []
    for case, seconds in result.layers.items():
        shares = sparse_shares(seconds)
        cells = [_ms(seconds["dense"]), _ms(seconds["sparse"]), f"{ratio(seconds):.2f}"]
        most = max(shares, key=lambda part: shares[part])
        rows.append([case.name, *cells, *(f"{share:.0%}" for share in shares.values()), most])
    return table(head, rows)


def sparse_shares(seconds: Seconds) -> dict[str, float]:
    """Which part of a sparse layer's time is what, by medians: kernels as timed alone, projections the rest."""
    names = ("sparse", "sparse kernels", "choosing")
    whole, attention, choosing = (median(seconds[name]) for name in names)
    return {
        "projections": max(whole - attention, 0.0) / whole,
        "choosing": choosing / whole,
        "attending": max(attention - choosing, 0.0) / whole,
    }


def memory_table(memory: Sequence[PromptMemory]) -> str:
    """Growth beside what scores for all pairs at once would take."""
    head = ["context", "queries", "choosing MB", "attention MB", "queries x keys x 4 B, MB"]
    rows = []
    for found in memory:
        everything = score_matrix_bytes(_PROMPT_CHUNK, found.context)
        sizes = [f"{size / 1e6:,.0f}" for size in (found.select_bytes, found.attend_bytes, everything)]
        rows.append([short(found.context), str(_PROMPT_CHUNK), *sizes])
    return table(head, rows)


def _ms(seconds: Sequence[float]) -> str:
    """Median, and the least."""
    return f"{1e3 * median(seconds):,.2f} ({1e3 * min(seconds):,.2f})"


def _both(cells: Iterator[str]) -> str:
    return " / ".join(cells)


def summary(results: Sequence[Measurement]) -> str:
    """The least ratio at the shortest and at the longest context."""
    cases = [(case.context, ratio(seconds)) for result in results for case, seconds in result.kernels.items()]
    ends = {end: min(found for context, found in cases if context == end) for end in _ends(cases)}
    return "; ".join(
        f"at {short(context)} sparse is at least {least:.2f} times as fast" for context, least in ends.items()
    )


def _ends(cases: Sequence[tuple[int, float]]) -> tuple[int, int]:
    contexts = [context for context, _ in cases]
    return min(contexts), max(contexts)


def results_json(
    results: Sequence[Measurement], memory: Sequence[PromptMemory], limits: Sequence[Limits]
) -> dict[str, object]:
    """The same for programs, with every round."""
    return {
        "bench": "dsa",
        "versions": versions("torch", "numpy", "numba"),
        "limits": [asdict(of_round) for of_round in limits],
        "results": [
            {
                "cache": result.cache,
                "arithmetic": result.arithmetic,
                "layer_weight_bytes": result.weight_bytes,
                "kernels": [_case_json(case, seconds) for case, seconds in result.kernels.items()],
                "layers": [_case_json(case, seconds) for case, seconds in result.layers.items()],
            }
            for result in results
        ],
        "prompt_memory": [asdict(found) | {"queries": _PROMPT_CHUNK} for found in memory],
    }


def _case_json(case: Case, seconds: Seconds) -> dict[str, object]:
    works: dict[str, Work] = {"dense": dense_work(case), "sparse": sparse_work(case)}
    return {
        "context": case.context,
        "batch": case.batch,
        "dense_over_sparse": ratio(seconds),
        "attention": {name: asdict(work) for name, work in works.items()},
        "seconds": seconds,
    }


def print_cache(result: Measurement, limits: Limits) -> None:
    """Both tables of one cache format."""
    print(f"\n{result.cache} caches, {result.arithmetic}; attention alone; cells with / are dense / sparse\n")
    print(kernels_table(result, limits))
    print(f"\nthe whole attention layer, {result.weight_bytes / 1e6:,.0f} MB of projections in its weights\n")
    print(layers_table(result))


def run(args: argparse.Namespace) -> None:
    """Measures, prints."""
    machine = this_machine()
    print(f"{describe(machine)}", flush=True)
    contexts, batches = (_QUICK_CONTEXTS, _QUICK_BATCHES) if args.quick else (_CONTEXTS, _BATCHES)
    limits, results = [Limits(**measure_limits(machine.cores))], []
    for cache in args.caches:
        results.append(measure(cache, contexts, batches, args.rounds))
        limits.append(Limits(**measure_limits(machine.cores)))
    chunks = contexts[-1:] if args.quick else _PROMPT_CONTEXTS
    memory = [measure_memory(context) for context in chunks] if can_measure_memory() else []
    best = Limits(max(found.stream_bytes_per_s for found in limits), max(found.gemm_flop_per_s for found in limits))
    print(", ".join(f"{name} {version}" for name, version in versions("torch", "numpy", "numba").items()))
    print(
        f"limits: memory streams at {best.stream_bytes_per_s / 1e9:.1f} GB/s, "
        f"bf16 GEMM {best.gemm_flop_per_s / 1e9:.0f} GFLOP/s"
    )
    print(f"medians (and least) of {args.rounds} rounds or more; {'A SMOKE TEST' if args.quick else summary(results)}")
    for result in results:
        print_cache(result, best)
    print(f"\nmemory of a prompt's chunk; index scores take {AttentionOptions().score_bytes / 1e6:.0f} MB at most\n")
    print(memory_table(memory) if memory else "not measured: this needs Linux")
    if args.json:
        write_json(args.json, machine, results_json(results, memory, limits))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Dense against sparse attention of one layer.", allow_abbrev=False)
    parser.add_argument("--caches", choices=CACHES, nargs="+", default=["bfloat16", "fp8"])
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is run at least")
    parser.add_argument("--quick", action="store_true", help="short contexts only: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    args = parser.parse_args()
    try:
        run(args)
    except NoAnswerError as error:
        sys.exit(f"no speed is reported: {error}")


if __name__ == "__main__":
    main()
