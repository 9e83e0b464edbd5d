"""Log-probabilities on a GPU against float64."""

import numpy as np
import pytest
import torch

from rempart_engine.kernels.top_logprobs import TopLogprobs, reference, top_logprobs


def assert_equals_the_reference(
    found: TopLogprobs, logits: torch.Tensor, rows: np.ndarray[tuple[int], np.dtype[np.int64]], ids: torch.Tensor
) -> None:
    num_top = found.ids.shape[1]
    chosen, top_ids, values = reference.top_logprobs(logits, rows, ids, num_top)
    torch.testing.assert_close(found.chosen.cpu(), chosen, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(found.logprobs.cpu(), values, rtol=1e-6, atol=3e-6)
    exists = values > -torch.inf
    assert torch.equal(found.ids.cpu()[exists], top_ids[exists])
    assert ((found.ids >= 0) & (found.ids < logits.shape[1])).all()


@pytest.mark.parametrize(("vocab_size", "num_top"), [(1, 1), (7, 7), (300, 0), (2048, 3), (5003, 20)])
def test_likeliest_tokens_in_order_and_among_equals_by_id(vocab_size: int, num_top: int, device: torch.device) -> None:
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    logits[1] = logits[1].bfloat16().float()
    logits[2] = 0.25
    logits[3] -= 1e4
    rows = np.array([4, 1, 2, 3])
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
    found = top_logprobs(logits.to(device), rows, ids.to(device), num_top)
    assert found.ids.shape == found.logprobs.shape == (4, num_top)
    assert_equals_the_reference(found, logits, rows, ids)


def test_forbidden_tokens_are_no_alternatives(device: torch.device) -> None:
    logits = torch.full((1, 4500), -torch.inf)
    logits[0, [4400, 3, 2500]] = torch.tensor([2.0, 2.0, -60.0])
    rows, ids = np.array([0]), torch.tensor([3])
    found = top_logprobs(logits.to(device), rows, ids.to(device), 5)
    assert found.ids[0, :3].tolist() == [3, 4400, 2500]
    assert_equals_the_reference(found, logits, rows, ids)


def test_a_bad_row_leaves_the_others_alone(device: torch.device) -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    logits[0, 5], logits[1, 6], logits[2] = torch.nan, torch.inf, -torch.inf
    rows, ids = np.arange(4), torch.tensor([5, 6, 0, 9])
    found = top_logprobs(logits.to(device), rows, ids.to(device), 4)
    good = TopLogprobs(found.chosen[3:], found.ids[3:], found.logprobs[3:])
    assert_equals_the_reference(good, logits, rows[3:], ids[3:])
    assert ((found.ids >= 0) & (found.ids < 100)).all()


def test_rows_may_lie_apart_and_none_may_be_wanted(device: torch.device) -> None:
    wide = torch.randn(3, 150, generator=torch.Generator().manual_seed(1))
    logits = wide[:, 25:125]
    rows, ids = np.array([2, 0]), torch.tensor([7, 99])
    assert_equals_the_reference(top_logprobs(wide.to(device)[:, 25:125], rows, ids.to(device), 6), logits, rows, ids)
    none = top_logprobs(logits.contiguous().to(device), rows[:0], ids[:0].to(device), 6)
    assert none.chosen.shape == (0,)
    assert none.ids.shape == none.logprobs.shape == (0, 6)


@pytest.mark.parametrize(
    ("logits", "ids", "num_top", "message"),
    [
        (torch.zeros(30), torch.zeros(1, dtype=torch.int64), 1, r"\[P, V\]"),
        (torch.zeros(2, 30, dtype=torch.float16), torch.zeros(1, dtype=torch.int64), 1, "float32"),
        (torch.zeros(30, 2).T, torch.zeros(1, dtype=torch.int64), 1, "side by side"),
        (torch.zeros(2, 30), torch.zeros(2, dtype=torch.int64), 1, "token ids"),
        (torch.zeros(2, 30), torch.zeros(1, dtype=torch.int32), 1, "token ids"),
        (torch.zeros(2, 30), torch.zeros(1, dtype=torch.int64), 31, "num_top must be 0 to 30"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, ids: torch.Tensor, num_top: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_logprobs(logits, np.array([1]), ids, num_top)
