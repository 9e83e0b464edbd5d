"""Every kernel at DeepSeek-V3.2's true shapes on this machine's GPU, a layer's attention, and a slice of the model.

    python bench/gpu.py [--groups attention ...] [--out FOLDER] [--dry-run]

At most nine minutes: each group is a process of its own, and ends at its limit with what it has found until then.
Writes `<date>-gpu-<card>.json` and plots. No number for a wrong answer: each point is checked before and after.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

import torch
from bench.gpu_plots import can_plot, plot
from bench.gpu_points import NOT_TIMED, Measured, measured_from
from bench.gpu_report import Run, refusals, results_json, text
from bench.gpu_work import Rates
from bench.report import ROOT, this_machine, versions, write_json

_WORKER = Path(__file__).with_name("gpu_worker.py")
_MOST_S = 520.0
"""Of the whole run; the report takes seconds."""


@dataclass(frozen=True, slots=True)
class Group:
    """Points that are measured in one process."""

    name: str
    most_s: float


GROUPS = (
    Group("index", 70),
    Group("attention", 90),
    Group("layer", 100),
    Group("experts", 70),
    Group("model", 150),
    Group("small", 40),
    Group("linear", 50),
)
"""In the order of what is asked first, should time run out."""
_LIMITS = Group("limits", 40)
_DRY_S = 900.0


@dataclass(frozen=True, slots=True)
class Said:
    """What a group's process said."""

    lines: tuple[dict[str, Any], ...]
    ending: str
    """Why there is not more; empty: there is no more."""


def run_group(group: Group, most_s: float, *, is_dry: bool) -> Said:
    """Runs one process, and ends it at the limit."""
    command = [sys.executable, "-P", str(_WORKER), "--group", group.name, *(["--dry-run"] if is_dry else [])]
    # Triton's default is about to change, and some versions warn of it: products and sums are fused, as ever.
    environ = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"} | ({"TRITON_INTERPRET": "1"} if is_dry else {})
    found, is_late = [], threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:

        def end() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(most_s, end)
        timer.start()
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        reader.start()
        for line in process.stdout or ():
            if line.startswith("{") and line.endswith("}\n"):  # libraries print too, and the last line may be cut
                found.append(json.loads(line))
        process.wait()
        timer.cancel()
        reader.join()
    return Said(tuple(found), _ending(most_s, process.returncode, errors, is_late=is_late.is_set()))


def _ending(most_s: float, return_code: int, errors: Sequence[str], *, is_late: bool) -> str:
    if is_late:
        return f"ended after {most_s:.0f} s"
    if return_code:
        return f"ended with {return_code}: {errors[-1].strip() if errors else 'nothing said'}"
    return ""


def measure_all(groups: Sequence[Group], most_s: float, *, is_dry: bool) -> Iterator[Measured]:
    """Every point of every group, while there is time; a dry run takes as long as it takes."""
    began = time.monotonic()
    for group in groups:
        left_s = most_s - (time.monotonic() - began)
        if left_s <= 0:
            yield Measured(group.name, "all", (), refusal="no time was left")
            continue
        said = run_group(group, left_s if is_dry else min(group.most_s, left_s), is_dry=is_dry)
        for line in said.lines:
            yield measured_from(line["measured"])
        if said.ending:
            yield Measured(group.name, "what would follow", (), refusal=said.ending)
        _note(f"{group.name}: {len(said.lines)} points, {time.monotonic() - began:.0f} s so far {said.ending}")


def slug(card: str) -> str:
    """For names of files: "NVIDIA H100 80GB HBM3" becomes h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia")).strip("-")


def dry_run(groups: Sequence[Group]) -> int:
    """Checks everything at tiny shapes; the number of points that are not right."""
    found = list(measure_all(groups, _DRY_S, is_dry=True))
    wrong = [one for one in found if one.refusal != NOT_TIMED]
    print(f"{len(found) - len(wrong)} of {len(found)} points are right; nothing was timed")
    if wrong:
        print(refusals(wrong))
    return len(wrong)


def run(groups: Sequence[Group], out: Path) -> int:
    """Measures, prints, writes; the number of wrong answers."""
    began, machine = time.monotonic(), this_machine()
    limits = run_group(_LIMITS, _LIMITS.most_s, is_dry=False)
    if not limits.lines:
        sys.exit(f"the card's limits cannot be measured: {limits.ending}")
    card, rates = limits.lines[0]["card"], Rates(**limits.lines[0]["rates"])
    left_s = _MOST_S - (time.monotonic() - began)
    done = Run(card, rates, tuple(measure_all(groups, left_s, is_dry=False)))
    print(text(done))
    stem = out / f"{datetime.now(UTC):%Y-%m-%d}-gpu-{slug(card)}"
    out.mkdir(parents=True, exist_ok=True)
    json_file = stem.with_name(f"{stem.name}.json")
    write_json(json_file, machine, results_json(done, versions("torch", "triton")))
    plots = plot(done, stem) if can_plot() else []
    print("\nwritten:", json_file, *plots, *([] if plots else ["(no plots: matplotlib is not installed)"]))
    return sum(one.refusal.startswith("wrong") for one in done.refused)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The command line."""
    names = [group.name for group in GROUPS]
    parser = argparse.ArgumentParser(description="Kernels and a slice of the model on a GPU.", allow_abbrev=False)
    parser.add_argument("--groups", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER", help="write there")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, interpreted: does all of it run, and right?"
    )
    args = parser.parse_args()
    groups = [group for group in GROUPS if group.name in args.groups]
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("there is no NVIDIA GPU, or torch was built without CUDA; --dry-run tries all of it without one")
    if num_wrong := dry_run(groups) if args.dry_run else run(groups, args.out):
        sys.exit(f"{num_wrong} points are wrong")


if __name__ == "__main__":
    main()
