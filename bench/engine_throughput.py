"""Tokens/s of Rempart's engine and of what a user would pick instead, side by side on one model.

    python bench/engine_throughput.py [--quick] [--vllm-python VENV/bin/python] [--llama-python VENV/bin/python]

Every engine is loaded once, in a process of its own, and asked in turn, round after round, while all others are
stopped; so whatever disturbs the machine disturbs all alike. No speed without a right answer: see `check_answers`.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

from bench.bundled_model import bundled_model
from bench.contender_process import Contender, ContenderError, ContenderSpec, measure_limits, running
from bench.peer_folder import write_peer_folder
from bench.points import FULL, QUICK, Limits, ModelSize, Point, bound, compare, prompts
from bench.report import describe, table, this_machine, versions, write_json

from rempart_engine.model.config import LlamaConfig
from rempart_engine.model.weights.source import open_llama
from rempart_platform.models import load_served_model
from rempart_platform.text.tokenizer import Tokenizer

OURS = "rempart"
_MAX_MODEL_LEN = 2048
_NUM_CHECK_TOKENS = 16
_BYTES_PER_PARAMETER = 2  # bf16


class WrongAnswerError(Exception):
    """An engine answers wrong, so its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """All rounds of all engines."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Point's name -> engine's name -> one time a round."""
    limits: list[Limits] = field(default_factory=list)
    """One a round."""

    def rates(self, point: Point) -> dict[str, list[float]]:
        """Counted tokens/s of every engine in every round."""
        of_point = self.seconds[point.name]
        return {name: [point.num_counted_tokens / spent_s for spent_s in times] for name, times in of_point.items()}

    def best_limits(self) -> Limits:
        """A limit is what was reached once."""
        return Limits(
            max(limits.stream_bytes_per_s for limits in self.limits),
            max(limits.gemm_flop_per_s for limits in self.limits),
        )


def chat_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """The question in ChatML, without a system message.

    With SmolLM2's own system message the first word of the answer to the check's question is nearly a tie (0.08 nats
    in float32), which any rounding may tip; without it, it is none (1.1 nats).
    """
    start, end = (tokenizer.special_token_id(mark) for mark in ("<|im_start|>", "<|im_end|>"))
    turn = [start, *tokenizer.encode(f"user\n{question}"), end, *tokenizer.encode("\n")]
    return [*turn, start, *tokenizer.encode("assistant\n")]


def check_float32(ours: Contender, oracle: Contender, tokenizer: Tokenizer) -> None:
    """Both begin their greedy answer with the same tokens, or WrongAnswerError."""
    prompt = chat_prompt(tokenizer, "Explain in a few sentences why the sky is blue.")
    answers = [engine.generate([prompt], _NUM_CHECK_TOKENS).token_ids[0] for engine in (ours, oracle)]
    if answers[0] != answers[1]:
        raise WrongAnswerError(f"in float32 {ours.name} says {answers[0]} and {oracle.name} says {answers[1]}")


def check_answers(engines: Sequence[Contender], tokenizer: Tokenizer) -> None:
    """Every engine knows the capital of France, or WrongAnswerError."""
    prompt = chat_prompt(tokenizer, "What is the capital of France?")
    for engine in engines:
        text = tokenizer.decode(engine.generate([prompt], _NUM_CHECK_TOKENS).token_ids[0])
        if "Paris" not in text:
            raise WrongAnswerError(f"{engine.name} on the capital of France: {text!r}")


def can_run(engine: Contender, point: Point) -> bool:
    """llama.cpp takes one request at a time here."""
    return engine.name != "llama.cpp" or point.num_requests == 1


def measure(engines: Sequence[Contender], points: Sequence[Point], num_rounds: int, vocab_size: int) -> Measurement:
    """Asks every engine at every point, alternating. The first, unmeasured time lets it prepare for the shape."""
    num_threads = this_machine().cores
    result = Measurement({point.name: {e.name: [] for e in engines if can_run(e, point)} for point in points})
    for point in points:
        for engine in engines:
            if can_run(engine, point):
                engine.generate(prompts(point, vocab_size), min(point.num_output_tokens, 4))
    for number in range(num_rounds):
        result.limits.append(Limits(**measure_limits(num_threads)))
        for point in points:
            for engine in engines:
                if can_run(engine, point):
                    answer = engine.generate(prompts(point, vocab_size), point.num_output_tokens)
                    result.seconds[point.name][engine.name].append(answer.seconds)
        _note(f"round {number + 1} of {num_rounds} is done")
    return result


def model_size(config: LlamaConfig) -> ModelSize:
    """Matrices of a Llama model in bf16."""
    width, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = width * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    return ModelSize(
        num_layer_parameters=config.num_layers * per_layer,
        num_head_parameters=config.vocab_size * width,
        num_layers=config.num_layers,
        attention_width=queries,
        bytes_per_parameter=_BYTES_PER_PARAMETER,
    )


def results_table(result: Measurement, points: Sequence[Point], engines: Sequence[Contender], size: ModelSize) -> str:
    """Medians of all engines at all points, with the comparison and the bound."""
    limits = result.best_limits()
    names = [engine.name for engine in engines]
    head = ["tokens/s", *names, "ours / best peer", "bf16 bound", "ours / bound"]
    rows = []
    for point in points:
        rates = result.rates(point)
        medians = {name: median(of_engine) for name, of_engine in rates.items()}
        comparison = compare(OURS, rates)
        at_most = bound(point, size, limits)
        cells = [f"{medians[name]:,.1f}" if name in medians else "" for name in names]
        ratio = f"{comparison.ratio:.2f} ({comparison.best_peer})" if comparison else ""
        rows.append([point.name, *cells, ratio, f"{at_most:,.0f}", f"{medians[OURS] / at_most:.0%}"])
    return table(head, rows)


def results_json(
    result: Measurement, points: Sequence[Point], engines: Sequence[Contender], size: ModelSize
) -> dict[str, object]:
    """The same for programs, with every round."""
    rates = {point: result.rates(point) for point in points}
    comparisons = {point: compare(OURS, rates[point]) for point in points}
    limits = result.best_limits()
    return {
        "engines": {engine.name: {"version": engine.version, "dtype": engine.dtype} for engine in engines},
        "versions": versions("torch", "numpy", "numba"),
        "weight_bytes_bf16": size.weight_bytes,
        "limits": [asdict(of_round) for of_round in result.limits],
        "points": [
            asdict(point)
            | {
                "name": point.name,
                "tokens_per_s": rates[point],
                "median_tokens_per_s": {name: median(of_engine) for name, of_engine in rates[point].items()},
                "against_best_peer": asdict(comparison) if (comparison := comparisons[point]) else None,
                "bf16_bound_tokens_per_s": bound(point, size, limits),
            }
            for point in points
        ],
    }


def print_conditions(result: Measurement, engines: Sequence[Contender], size: ModelSize) -> None:
    """What one must know to read the table."""
    limits = result.best_limits()
    for engine in engines:
        print(f"- {engine.name} {engine.version}, {engine.dtype}")
    print(", ".join(f"{name} {version}" for name, version in versions("torch", "numpy", "numba").items()))
    steps_per_s = limits.stream_bytes_per_s / size.weight_bytes
    print(
        f"limits: memory streams at {limits.stream_bytes_per_s / 1e9:.1f} GB/s and bf16 weights are "
        f"{size.weight_bytes / 1e6:.0f} MB, so {steps_per_s:.0f} steps/s; "
        f"bf16 GEMM {limits.gemm_flop_per_s / 1e9:.0f} GFLOP/s\n"
    )


def peers(args: argparse.Namespace, folder: Path) -> list[ContenderSpec]:
    """The engines to compare with, as far as their virtual environments are given."""
    found = [ContenderSpec("transformers", sys.executable, folder, "bfloat16")]
    if args.vllm_python:
        found.append(ContenderSpec("vllm-cpu", args.vllm_python, folder, "bfloat16"))
    if args.llama_python:
        found.append(ContenderSpec("llama.cpp", args.llama_python, args.model, "auto"))
    return found


def run(args: argparse.Namespace) -> None:
    """Checks, measures, prints."""
    machine = this_machine()
    print(f"{describe(machine)}\n", flush=True)
    config = open_llama(args.model).config
    tokenizer = load_served_model(
        args.model, name=args.model.name, max_model_len=config.max_model_len, created_s=0
    ).tokenizer
    points, num_rounds = (QUICK, 1) if args.quick else (FULL, args.rounds)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rempart-bench-")))
        write_peer_folder(args.model, folder)

        def start(spec: ContenderSpec, within: ExitStack) -> Contender:
            _note(f"loading {spec.name} ({spec.dtype})")
            return within.enter_context(running(spec, num_threads=machine.cores, max_model_len=_MAX_MODEL_LEN))

        with ExitStack() as checked:
            ours = start(ContenderSpec(OURS, sys.executable, args.model, "float32"), checked)
            oracle = start(ContenderSpec("transformers", sys.executable, folder, "float32"), checked)
            check_float32(ours, oracle, tokenizer)
        specs = [ContenderSpec(OURS, sys.executable, args.model, "auto"), *peers(args, folder)]
        engines = [start(spec, stack) for spec in specs]
        check_answers(engines, tokenizer)
        result = measure(engines, points, num_rounds, config.vocab_size)
    size = model_size(config)
    print(f"{args.model.name}, medians of {num_rounds} rounds{': A SMOKE TEST, NO MEASUREMENT' if args.quick else ''}")
    print_conditions(result, engines, size)
    print(results_table(result, points, engines, size))
    if args.json:
        content: Mapping[str, object] = results_json(result, points, engines, size)
        write_json(args.json, machine, {"bench": "engine_throughput", "model": args.model.name, **content})


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """The command line."""
    model = bundled_model()
    parser = argparse.ArgumentParser(description="Tokens/s of Rempart's engine beside its peers.", allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=model, required=model is None, help="GGUF file or folder")
    parser.add_argument("--rounds", type=int, default=3, help="how often each engine is asked at each point")
    parser.add_argument("--quick", action="store_true", help="one round of small points: does it run at all?")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="interpreter of a virtual environment with vllm-cpu")
    parser.add_argument("--llama-python", metavar="PYTHON", help="the same with llama-cpp-python; needs a GGUF model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that the engines are stopped
    try:
        run(args)
    except (ContenderError, WrongAnswerError) as error:
        sys.exit(f"no speed is reported: {error}")


if __name__ == "__main__":
    main()
