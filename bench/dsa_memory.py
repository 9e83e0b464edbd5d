"""How much memory one layer's sparse attention takes for a chunk of a long prompt, beside caches and inputs.

    python bench/dsa_memory.py --context 131072 --queries 512
    stdout  {"select_bytes": ..., "attend_bytes": ...}: growth of resident memory while it ran, at its peak

Linux only: a process of its own forgets its peak through /proc/self/clear_refs.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

import torch
from bench.dsa_caches import fill_caches, new_tokens
from bench.dsa_contestants import attend, choose
from bench.dsa_points import V32

_FORGET_PEAK = "5"

Result = TypeVar("Result")


def growth_of(work: Callable[[], Result]) -> tuple[Result, int]:
    """What it gives, and by how many bytes resident memory grew at most."""
    Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)
    before = _status_bytes("VmRSS")
    result = work()
    return result, _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--queries", type=int, required=True)
    args = parser.parse_args()
    with torch.inference_mode():
        caches = fill_caches("bfloat16", args.context)
        small = new_tokens(caches, [(V32.indexer.top_k + 64, 1)])
        attend(caches, small, choose(caches, small))  # kernels are loaded
        new = new_tokens(caches, [(args.context, args.queries)])
        selection, select_bytes = growth_of(lambda: choose(caches, new))
        _, attend_bytes = growth_of(lambda: attend(caches, new, selection))
    print(json.dumps({"select_bytes": select_bytes, "attend_bytes": attend_bytes}))


if __name__ == "__main__":
    main()
