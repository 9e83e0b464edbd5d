"""The bench of sparse attention: its counts are those of the published model, and its checks notice what is wrong."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench/ is no installed package

from bench.dsa import ratio, sparse_shares
from bench.dsa_caches import Caches, NewTokens, fill_caches, new_tokens
from bench.dsa_check import WrongAnswerError, check, check_choice, check_close
from bench.dsa_contestants import attend, choose, sparse
from bench.dsa_points import (
    CACHES,
    INDEX_BYTES,
    LATENT_BYTES,
    V32,
    Cache,
    Case,
    dense_work,
    score_matrix_bytes,
    short,
    sparse_work,
)

from rempart_engine.config import BLOCK_SIZE
from rempart_engine.kernels.select_tokens import Selection
from rempart_engine.model.deepseek.kv_pools import kv_pools
from rempart_engine.model.deepseek.rotary import softmax_scale


def test_flops_per_pair_are_the_published_ones() -> None:
    assert dense_work(Case("fp8", 1, 1)).flop == 278_528
    one_more_key = sparse_work(Case("fp8", 4097, 1)).flop - sparse_work(Case("fp8", 4096, 1)).flop
    assert one_more_key == 16_384
    assert sparse_work(Case("fp8", 131_072, 16)).flop == 16 * (131_072 * 16_384 + 2048 * 278_528)


@pytest.mark.parametrize("cache", CACHES)
def test_bytes_are_those_of_the_pools(cache: Cache) -> None:
    pools = kv_pools(V32, 0, "fp8" if cache == "fp8" else getattr(torch, cache))
    per_token = [pool.block_bytes // (pool.num_layers * BLOCK_SIZE) for pool in pools]
    assert [LATENT_BYTES[cache], INDEX_BYTES[cache]] == per_token


def test_bytes_read() -> None:
    assert dense_work(Case("bfloat16", 131_072, 16)).read_bytes == 16 * 131_072 * 1152
    assert sparse_work(Case("fp8", 131_072, 1)).read_bytes == 131_072 * 132 + 2048 * 656


@pytest.mark.parametrize("context", [1, 2047, 2048])
def test_the_short_cut_costs_what_dense_costs(context: int) -> None:
    assert sparse_work(Case("fp8", context, 4)) == dense_work(Case("fp8", context, 4))


def test_times_are_compared_by_medians() -> None:
    seconds = {
        "dense": [9.0, 8.0, 80.0],
        "sparse": [4.0, 4.0, 1.0],
        "sparse kernels": [3.0, 3.0, 30.0],
        "choosing": [1.0, 1.0, 0.0],
    }
    assert ratio(seconds) == 9.0 / 4.0
    assert sparse_shares(seconds) == {"projections": 0.25, "choosing": 0.25, "attending": 0.5}


def test_the_shape_has_the_published_softmax_scale() -> None:
    assert softmax_scale(V32) == pytest.approx(0.1352338, abs=1e-7)


def test_all_pairs_of_a_chunk_at_128k_take_a_quarter_of_a_gigabyte() -> None:
    assert score_matrix_bytes(512, 131_072) == 256 << 20
    assert (short(131_072), short(1000)) == ("128K", "1,000")


@pytest.fixture(scope="module", params=["bfloat16", "fp8"])
def decoding(request: pytest.FixtureRequest) -> tuple[Case, Caches, NewTokens]:
    case = Case(request.param, 2112, 2)
    caches = fill_caches(case.cache, 2 * 2112)
    return case, caches, new_tokens(caches, [(case.context, 1)] * case.batch)


def test_right_answers_pass(decoding: tuple[Case, Caches, NewTokens]) -> None:
    check(*decoding)
    _, caches, new = decoding
    assert torch.equal(sparse(caches, new), attend(caches, new, choose(caches, new)))


def test_a_foreign_choice_is_refused() -> None:
    scores = torch.linspace(0.0, 1.0, 2112)
    best = torch.arange(64, 2112)
    check_choice(best, scores, 2048, "best")
    for wrong in (best - 64, best[1:], torch.cat((best[1:], best[-1:])), best + 1):
        with pytest.raises(WrongAnswerError, match="chosen"):
            check_choice(wrong, scores, 2048, "wrong")


def test_ties_may_be_chosen_in_any_order() -> None:
    check_choice(torch.tensor([0, 3]), torch.tensor([1.0, 0.5, 0.5, 0.5]), 2, "tied")


def test_attention_to_other_tokens_is_refused(decoding: tuple[Case, Caches, NewTokens]) -> None:
    _, caches, new = decoding
    selection = choose(caches, new)
    expected = attend(caches, new, selection)
    fewer = Selection(selection.positions, selection.counts - 64)
    with pytest.raises(WrongAnswerError, match="differs"):
        check_close(attend(caches, new, fewer)[0], expected[0].float(), "fewer")


def test_results_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(WrongAnswerError, match="differs"):
        check_close(torch.full((2, 2), torch.nan), torch.ones(2, 2), "nan")
