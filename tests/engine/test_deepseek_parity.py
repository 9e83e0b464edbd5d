"""DeepSeek models on the CPU against transformers in float32, and what must not go unnoticed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.engine.deepseek_parity import (
    AS_PUBLISHED,
    CASES,
    LONG,
    TOLERANCE,
    Both,
    Case,
    Oracle,
    Parity,
    both,
    in_pieces,
)
from torch import nn

from rempart_engine.model.deepseek import attention
from rempart_engine.model.deepseek.config import DeepseekConfig
from rempart_engine.model.deepseek.moe import MoE, Router
from rempart_engine.model.deepseek.stepping import Stepper
from rempart_engine.model.deepseek.testing import write_checkpoint


@pytest.fixture(scope="module", params=CASES, ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both(request.param, tmp_path_factory.mktemp("deepseek"), "cpu")


class TestOnCpu(Parity):
    pass


@pytest.mark.parametrize(
    "case",
    [LONG[0], replace(LONG[1], length=3072), pytest.param(LONG[1], marks=pytest.mark.slow)],  # the oracle's square
    ids=str,
)
def test_far_beyond_the_top_k(case: Case, tmp_path: Path) -> None:
    """At up to 8,192 tokens, in steps of about 2,000 and the last tokens one by one. Of so many choices a layer a few
    may be swapped.
    """
    pair = both(case, tmp_path, "cpu")
    token_ids = case.tokens()
    logits = pair.ours.run(0, token_ids, [*in_pieces(case.length - 4, (2048, 1999)), *[1] * 4])
    pair.assert_equal(token_ids, logits, max_swaps=case.length // 200)


# What must not go unnoticed.


MUTATED = [Case(1, 8, 300, yarn=AS_PUBLISHED), Case(10, 8, 280, is_glm=True, indexers="FSFS")]


def deviation(case: Case, folder: Path) -> float:
    """Largest difference of logits between our model, loaded now, and a faithful one."""
    faithful = folder.with_name(f"{folder.name}-faithful")
    write_checkpoint(faithful, case.config(), dtype="float32", seed=case.seed)
    token_ids = case.tokens()
    expected = Oracle(faithful, case.top_k).logits(token_ids)
    stepper = Stepper(folder)
    return (stepper.run(0, token_ids, [len(token_ids)]) - expected).abs().max().item()


class LeakingRouter(nn.Module):
    """Weighs experts by what only chooses them: scores with their bias."""

    def __init__(self, router: Router, case: Case) -> None:
        super().__init__()
        self.router = router
        self._moe = case.config().moe

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts, _ = self.router(x)
        weights = (self.router.gate(x.float()).sigmoid() + self.router.bias).gather(1, experts)
        if self._moe.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights * self._moe.routed_scaling_factor


@pytest.mark.parametrize("case", MUTATED, ids=str)
def test_the_other_rope_layout_of_the_indexer_is_noticed(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "mutant"
    write_checkpoint(folder, case.config(), dtype="float32", seed=case.seed)
    fields = json.loads((folder / "config.json").read_bytes())
    assert deviation(case, folder) <= TOLERANCE
    (folder / "config.json").write_text(json.dumps({**fields, "indexer_rope_interleave": not case.is_glm}))
    assert deviation(case, folder) > 1000 * TOLERANCE


def test_a_softmax_scale_without_yarn_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MUTATED[0]
    write_checkpoint(tmp_path / "mutant", case.config(), dtype="float32", seed=case.seed)

    def without_temperature(config: DeepseekConfig) -> float:
        return float((config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5)

    monkeypatch.setattr(attention, "softmax_scale", without_temperature)
    assert deviation(case, tmp_path / "mutant") > 1000 * TOLERANCE


def test_a_router_whose_bias_weighs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MUTATED[0]
    write_checkpoint(tmp_path / "mutant", case.config(), dtype="float32", seed=case.seed)
    forward = MoE.forward

    def with_leaking_router(self: MoE, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.router, Router):
            self.router = LeakingRouter(self.router, case)  # type: ignore[assignment]  # the mutation
        return forward(self, x)

    monkeypatch.setattr(MoE, "forward", with_leaking_router)
    assert deviation(case, tmp_path / "mutant") > 1000 * TOLERANCE
