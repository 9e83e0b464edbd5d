"""DeepSeek models on the GPU path against transformers in float32: the CPU's own suite, on another device.

In Triton's interpreter a token takes a second, so that there the sequences are short, and the configurations few: every
family, rotary layout, grouping and sharing of indexers comes up once. On a GPU it is the whole suite.
"""

from pathlib import Path

import pytest
from tests.engine.deepseek_parity import AS_PUBLISHED, CASES, LONG, Both, Case, Parity, both, in_pieces

from rempart_engine.kernels.target import INTERPRETED

SHORT = [
    Case(1, 8, 75, yarn=AS_PUBLISHED, indexers="FF"),
    Case(10, 16, 70, is_glm=True, indexers="FS"),
]


@pytest.fixture(scope="module", params=SHORT if INTERPRETED else CASES, ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both(request.param, tmp_path_factory.mktemp("deepseek"), "cuda")


class TestOnGpu(Parity):
    pass


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=str)
def test_at_8192_tokens(case: Case, tmp_path: Path) -> None:
    pair = both(case, tmp_path, "cuda")
    token_ids = case.tokens()
    logits = pair.ours.run(0, token_ids, [*in_pieces(case.length - 4, (2048, 1999)), *[1] * 4])
    pair.assert_equal(token_ids, logits, max_swaps=case.length // 200)
