"""Measures one group of points, in a process of its own; `gpu.py` starts it.

    python bench/gpu_worker.py --group attention [--dry-run]
    stdout  JSON lines: {"card": ..., "rates": ...} of the group "limits"; {"measured": ...} for each point of others

A dry run takes tiny shapes, needs no GPU (TRITON_INTERPRET=1), checks, and times nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

import torch
from bench.gpu_attention import attention_points, layer_points, score_points, store_points, top_k_points
from bench.gpu_limits import bytes_per_s, flop_per_s
from bench.gpu_model import model_points
from bench.gpu_points import FULL, TINY, Point, Sizes
from bench.gpu_products import expert_points, linear_points, norm_points
from bench.gpu_sampling import sampling_points
from bench.gpu_timing import EventTimer, measure
from bench.gpu_work import Rates

POINTS: Mapping[str, tuple[Callable[[Sizes, torch.device], Iterator[Point]], ...]] = {
    "index": (score_points, top_k_points),
    "attention": (attention_points,),
    "layer": (layer_points,),
    "experts": (expert_points,),
    "linear": (linear_points,),
    "small": (store_points, norm_points, sampling_points),
}
"""By group, all but "limits" and "model", which are no points."""


def lines(group: str, *, is_dry: bool) -> Iterator[dict[str, object]]:
    """What is to be said, line by line."""
    if group == "limits":
        timer = EventTimer()
        yield {"card": torch.cuda.get_device_name(), "rates": asdict(Rates(bytes_per_s(timer), flop_per_s(timer)))}
        return
    sizes, device = (TINY, torch.device("cpu")) if is_dry else (FULL, torch.device("cuda"))
    if group == "model":
        for found in model_points(sizes, device, is_timed=not is_dry):
            yield {"measured": asdict(found)}
        return
    timer_or_none = None if is_dry else EventTimer()
    for points in POINTS[group]:
        for point in points(sizes, device):
            yield {"measured": asdict(measure(point, timer_or_none))}


def main() -> None:
    """Measures and says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--group", choices=("limits", *POINTS, "model"), required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    with torch.inference_mode():
        for line in lines(args.group, is_dry=args.dry_run):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
