"""Rotation of heads on the GPU path."""

import pytest
import torch

from rempart_engine.kernels.rope import Angles, RopeLayout, rotate, rotate_in_place
from rempart_engine.kernels.rope.reference import rotate as reference

DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS: list[RopeLayout] = ["half-split", "interleaved"]
# Heads, their size, and how much of it is turned.
SHAPES = [(1, 2, 2), (3, 11, 6), (7, 6, 6), (37, 64, 64), (5, 128, 64)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_angles(num_tokens: int, rope_dim: int) -> Angles:
    angles = torch.rand(num_tokens, rope_dim // 2) * 6
    return angles.cos(), angles.sin()


def on(device: torch.device, angles: Angles) -> Angles:
    return angles[0].to(device), angles[1].to(device)


def exactly(x: torch.Tensor, angles: Angles, layout: RopeLayout) -> torch.Tensor:
    return reference(x.float(), *angles, layout == "interleaved")


def assert_rounded_once(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Products and a sum in float32 of numbers below 5, the result rounded once to its type."""
    error = torch.finfo(ours.dtype).eps / 2 * exact.abs() + 20 * torch.finfo(torch.float32).eps
    assert ((ours.float().cpu() - exact).abs() <= error).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "dim", "rope_dim"), SHAPES)
def test_rotation_equals_its_reference(
    device: torch.device, dtype: torch.dtype, layout: RopeLayout, heads: int, dim: int, rope_dim: int
) -> None:
    x, angles = torch.randn(3, heads, dim).clamp(-5, 5).to(dtype), random_angles(3, rope_dim)
    ours = rotate(x.to(device), on(device, angles), layout)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert_rounded_once(ours, exactly(x, angles, layout))
    assert torch.equal(ours.cpu()[..., rope_dim:], x[..., rope_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("start", "stop", "rope_dim"), [(5, 15, 10), (5, 13, 6), (0, 16, 16)])
def test_rotation_in_place_turns_its_part_of_each_head_and_nothing_else(
    device: torch.device, dtype: torch.dtype, layout: RopeLayout, start: int, stop: int, rope_dim: int
) -> None:
    x, angles = torch.randn(4, 3, 16).clamp(-5, 5).to(dtype), random_angles(4, rope_dim)
    ours = x.to(device, copy=True)
    rotate_in_place(ours[..., start:stop], on(device, angles), layout)
    assert_rounded_once(ours[..., start:stop], exactly(x[..., start:stop], angles, layout))
    ours[..., start : start + rope_dim] = x[..., start : start + rope_dim].to(device)
    assert torch.equal(ours.cpu(), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_of_any_strides_is_turned_as_its_copy_is(device: torch.device, layout: RopeLayout) -> None:
    x, angles = torch.randn(3, 2, 20, device=device).transpose(0, 1)[..., 4:15], on(device, random_angles(2, 8))
    ours = rotate(x, angles, layout)
    assert ours.is_contiguous()
    assert torch.equal(ours, rotate(x.contiguous(), angles, layout))


def test_nans_stay_in_their_pair(device: torch.device) -> None:
    x, angles = torch.randn(1, 1, 10), on(device, random_angles(1, 8))
    x[0, 0, 3] = torch.nan
    for layout, pair in (("half-split", [3, 7]), ("interleaved", [2, 3])):
        ours = rotate(x.to(device), angles, "half-split" if layout == "half-split" else "interleaved")
        assert ours[0, 0].isnan().nonzero().flatten().tolist() == pair


def test_no_tokens_are_turned_into_none(device: torch.device) -> None:
    assert rotate(torch.zeros(0, 3, 8, device=device), on(device, random_angles(0, 8)), "interleaved").shape == (
        0,
        3,
        8,
    )


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, (cos, sin) = torch.randn(3, 2, 8, device=device), on(device, random_angles(3, 8))
    for turn in (rotate, rotate_in_place):
        with pytest.raises(ValueError, match="are not of"):
            turn(x[:2], (cos, sin), "interleaved")
        with pytest.raises(ValueError, match="are not of"):
            turn(x[..., :6], (cos, sin), "interleaved")
        with pytest.raises(ValueError, match="bfloat16"):
            turn(x, (cos, sin.bfloat16()), "interleaved")
        with pytest.raises(ValueError, match="contiguous"):
            turn(x, (cos[:, ::2], sin[:, ::2]), "interleaved")
        with pytest.raises(ValueError, match="side by side"):
            turn(x.transpose(1, 2)[..., :2], (cos[:, :1].contiguous(), sin[:, :1].contiguous()), "interleaved")
