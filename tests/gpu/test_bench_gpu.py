"""Every point of the GPU's bench at tiny shapes: that it runs, and that its own check finds it right."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench/ is no installed package

from bench.dsa_check import WrongAnswerError
from bench.gpu_attention import attention_points, layer_points, score_points, store_points, top_k_points
from bench.gpu_model import model_points
from bench.gpu_points import NOT_TIMED, TINY, Point, Sizes
from bench.gpu_products import expert_points, linear_points, norm_points
from bench.gpu_timing import measure
from bench.gpu_worker import POINTS


@pytest.mark.parametrize("group", POINTS)
def test_points_are_right(group: str, device: torch.device) -> None:
    found = {}
    with torch.inference_mode():
        for points in POINTS[group]:
            for point in points(TINY, device):
                found[point.group, point.name] = measure(point, None).refusal
    assert set(found.values()) == {NOT_TIMED}, found


@pytest.mark.parametrize(
    "points",
    [score_points, top_k_points, attention_points, layer_points, expert_points, linear_points, norm_points],
)
def test_checks_refuse_zeros(points: Callable[[Sizes, torch.device], Iterator[Point]], device: torch.device) -> None:
    with torch.inference_mode():
        point = next(points(TINY, device))
        result = point.run()
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
        with pytest.raises(WrongAnswerError):
            point.check(result)


def test_checks_refuse_what_was_not_stored(device: torch.device) -> None:
    with torch.inference_mode():
        point = next(store_points(TINY, device))
        with pytest.raises(WrongAnswerError):
            point.check(None)


@pytest.mark.slow
def test_a_slice_of_the_model_is_right(device: torch.device) -> None:
    with torch.inference_mode():
        found = list(model_points(TINY, device, is_timed=False))
    assert {one.refusal for one in found} == {NOT_TIMED}, [asdict(one) for one in found]
