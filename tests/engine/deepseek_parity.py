"""DeepSeek models against transformers in float32, on any device: the oracle, random configurations, and the ways that
a token can be computed.

transformers computes attention densely, with a mask, and keeps keys of all heads; none of its code is ours.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rempart_engine.config import DeviceName
from rempart_engine.model.deepseek.config import DeepseekConfig, IndexerConfig, MoEConfig, YarnScaling
from rempart_engine.model.deepseek.stepping import Stepper
from rempart_engine.model.deepseek.testing import oracle, write_checkpoint
from rempart_engine.offline import LLM, SamplingParams

TOLERANCE = 1e-4
ORACLE_CHUNK = 1024
"""The oracle's memory is heads x chunk x context."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a random configuration must have; all else follows from the seed."""

    seed: int
    top_k: int
    length: int
    num_dense_layers: int = 1
    indexers: str = "FFF"
    """A letter for each layer: of its own (F), or shared (S)."""
    is_glm: bool = False
    yarn: YarnScaling | None = None
    norm_topk_prob: bool = True

    def __str__(self) -> str:
        family = "glm" if self.is_glm else "deepseek"
        return f"{family}-top{self.top_k}-of-{self.length}-{self.indexers}-{'yarn' if self.yarn else 'plain'}"

    def config(self) -> DeepseekConfig:
        """Odd sizes. Latents, rotary keys and index keys have one of two, for kernels are compiled for each."""
        draw = random.Random(self.seed)
        num_groups = draw.choice((1, 2, 3, 4))
        num_chosen_groups = draw.randint(1, num_groups)
        group_size = draw.randint(2, 5)
        latent_dim, rope_dim = draw.choice(((16, 8), (37, 6)))
        return DeepseekConfig(
            architecture="GlmMoeDsaForCausalLM" if self.is_glm else "DeepseekV32ForCausalLM",
            vocab_size=draw.randint(40, 130),
            hidden_size=draw.randint(30, 60),
            intermediate_size=draw.randint(30, 70),
            num_layers=len(self.indexers),
            num_dense_layers=self.num_dense_layers,
            num_heads=draw.choice((1, 3, 5, 7)),
            q_lora_rank=draw.randint(17, 31),
            kv_lora_rank=latent_dim,
            qk_nope_head_dim=draw.randint(5, 13),
            qk_rope_head_dim=rope_dim,
            v_head_dim=draw.randint(5, 13),
            rms_norm_eps=draw.choice((1e-6, 1e-5)),
            rope_theta=draw.choice((1e4, 1e6)),
            rope_scaling=self.yarn,
            max_model_len=max(1024, self.length),
            moe=MoEConfig(
                num_experts=num_groups * group_size,
                num_shared_experts=draw.choice((1, 2)),
                num_experts_per_token=draw.randint(1, num_chosen_groups * group_size),
                intermediate_size=draw.randint(11, 29),
                num_groups=num_groups,
                num_chosen_groups=num_chosen_groups,
                norm_topk_prob=self.norm_topk_prob,
                routed_scaling_factor=draw.choice((1.0, 2.5)),
            ),
            indexer=IndexerConfig(
                num_heads=draw.choice((13, 15, 33)),  # with few heads, all ReLUs of several tokens are off: they tie
                head_dim=draw.choice((16, 19)),
                top_k=self.top_k,
                rope="interleaved" if self.is_glm else "half-split",
                is_full=tuple(letter == "F" for letter in self.indexers),
            ),
            num_mtp_layers=0,
        )

    def tokens(self, seed: int = 0, length: int | None = None) -> list[int]:
        draw = random.Random(1000 * self.seed + seed)
        return [draw.randrange(self.config().vocab_size) for _ in range(self.length if length is None else length)]


AS_PUBLISHED = YarnScaling(factor=40.0, original_max_position_embeddings=64)
UNEVEN = YarnScaling(4.0, 100, beta_fast=20.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3)

CASES = [
    Case(1, 8, 300, yarn=AS_PUBLISHED),
    Case(2, 8, 260, num_dense_layers=2, indexers="FFFF"),
    Case(3, 11, 200, num_dense_layers=0, indexers="FF", yarn=UNEVEN),
    Case(4, 16, 300, num_dense_layers=3, indexers="FFFF", yarn=AS_PUBLISHED),
    Case(5, 23, 333, num_dense_layers=3),
    Case(16, 64, 400, yarn=AS_PUBLISHED),
    Case(15, 100, 350, norm_topk_prob=False, indexers="FF"),
    Case(8, 128, 300, num_dense_layers=2, yarn=UNEVEN),
    Case(9, 256, 600, indexers="FF", yarn=AS_PUBLISHED),
    Case(10, 8, 280, is_glm=True, indexers="FSFS"),
    Case(11, 31, 300, is_glm=True),
    Case(12, 64, 330, is_glm=True, indexers="FSSF", num_dense_layers=3),
    Case(13, 200, 500, is_glm=True, indexers="FFS", yarn=AS_PUBLISHED),
    Case(14, 40, 320, yarn=AS_PUBLISHED),
]
LONG = [
    Case(21, 256, 8192, indexers="FF", yarn=replace(AS_PUBLISHED, original_max_position_embeddings=256)),
    Case(22, 64, 8192, indexers="FS", is_glm=True),
]


class Oracle:
    """The `transformers` model, which compares what its indexers choose with what ours chose.

    Rounding may swap the last token that is chosen and the first that is not, when their scores are neighbours. Such
    swaps are counted, and the oracle goes on with our choice, so that logits say nothing about them.
    """

    def __init__(self, folder: Path, top_k: int) -> None:
        self._model = oracle(folder)
        self._top_k = top_k
        self._ours: Sequence[torch.Tensor] = ()
        self.num_swaps = 0
        self._start = 0
        self._indexers = [module for module in self._model.modules() if type(module).__name__.endswith("Indexer")]
        for indexer in self._indexers:
            indexer.index_topk = top_k + 1  # type: ignore[assignment]  # a plain attribute of the oracle's
            indexer.register_forward_hook(self._compare)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], ours: Sequence[torch.Tensor] = ()) -> torch.Tensor:  # [S, V]
        """Of all positions. `ours` [S, S] bool of each indexer: what our model chose, to be compared."""
        self._ours, past, parts = ours, None, []
        for self._start in range(0, len(token_ids), ORACLE_CHUNK):
            chunk = torch.tensor([token_ids[self._start : self._start + ORACLE_CHUNK]])
            outcome = self._model(chunk, past_key_values=past, use_cache=True)
            parts.append(outcome.logits[0])
            past = outcome.past_key_values
        return torch.cat(parts)

    def _compare(self, indexer: nn.Module, args: object, ranked: torch.Tensor) -> torch.Tensor:
        """Ranked [1, n, k + 1] are the tokens with the largest scores, in their order; returns [1, n, k]."""
        theirs, runner_up = (part.long() for part in ranked[0].tensor_split([self._top_k], dim=1))
        if not self._ours or not runner_up.numel():
            return theirs[None]
        places = torch.arange(self._start, self._start + len(theirs))
        visible = torch.arange(self._start + len(theirs)) <= places[:, None]
        mine = self._ours[self._indexers.index(indexer)][places, : visible.shape[1]]

        def as_mask(chosen: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(visible).scatter_(1, chosen, True) & visible

        differing = (as_mask(theirs) != mine).any(1)
        theirs[differing, -1] = runner_up[differing, 0]
        assert torch.equal(as_mask(theirs), mine), "the chosen tokens are others"
        self.num_swaps += int(differing.sum())
        return theirs[None]


@dataclass(frozen=True, slots=True)
class Both:
    """A case's two models."""

    case: Case
    folder: Path
    ours: Stepper
    theirs: Oracle
    device: DeviceName

    def assert_equal(self, token_ids: Sequence[int], logits: torch.Tensor, row: int = 0, max_swaps: int = 0) -> None:
        """Our logits and choices are the oracle's. The seeds are such that short sequences bring no swaps at all."""
        before = self.theirs.num_swaps
        expected = self.theirs.logits(token_ids, self.ours.chosen[row])
        assert (logits - expected).abs().max().item() <= TOLERANCE
        assert self.theirs.num_swaps - before <= max_swaps


def both(case: Case, folder: Path, device: DeviceName) -> Both:
    write_checkpoint(folder, case.config(), dtype="float32", seed=case.seed, num_shards=1)
    ours = Stepper(folder, max_model_len=max(1024, case.length), device=device)
    return Both(case, folder, ours, Oracle(folder, case.top_k), device)


def in_pieces(total: int, sizes: Sequence[int]) -> list[int]:
    """The sizes over and over, up to the total."""
    pieces: list[int] = []
    while sum(pieces) < total:
        pieces.append(min(sizes[len(pieces) % len(sizes)], total - sum(pieces)))
    return pieces


class Parity:
    """Every test of a pair of models, given by the fixture `models`."""

    def test_in_one_step(self, models: Both) -> None:
        """Every context from 1 token on: below the indexer's top-k, at it and far beyond."""
        token_ids = models.case.tokens()
        models.assert_equal(token_ids, models.ours.run(0, token_ids, [len(token_ids)]))

    def test_in_chunks(self, models: Both) -> None:
        token_ids = models.case.tokens(1)
        models.assert_equal(token_ids, models.ours.run(0, token_ids, in_pieces(len(token_ids), (1, 63, 65, 7, 130))))

    def test_token_by_token(self, models: Both) -> None:
        """From below the top-k, where everything is seen, to beyond; and at the end."""
        token_ids = models.case.tokens(2)
        before = models.case.top_k - 3
        rest = len(token_ids) - before - 6 - 5
        models.assert_equal(token_ids, models.ours.run(0, token_ids, [before, *[1] * 6, rest, *[1] * 5]))

    def test_beside_sequences_of_other_lengths(self, models: Both) -> None:
        """Long prefill, decoding and short prompts in one step."""
        top_k, length = models.case.top_k, models.case.length
        sequences = [models.case.tokens(row, count) for row, count in enumerate((length, top_k, top_k + 1, 2))]
        for row, token_ids in enumerate(sequences):
            models.ours.start(row, token_ids)
        steps = [{0: length - 2}, {0: 1, 2: top_k, 1: top_k - 3}, {3: 2, 2: 1, 0: 1, 1: 3}]
        parts: dict[int, list[torch.Tensor]] = {row: [] for row in range(4)}
        for step in steps:
            for row, logits in models.ours.step(step).items():
                parts[row].append(logits)
        for row, token_ids in enumerate(sequences):
            models.assert_equal(token_ids, torch.cat(parts[row]), row)

    def test_after_blocks_of_another_sequence_with_the_same_prefix(self, models: Both) -> None:
        token_ids = models.case.tokens(3)
        models.ours.run(0, token_ids, [len(token_ids)])
        computed = models.ours.chosen[0]
        shared = len(token_ids) // 64 - 1
        models.ours.start(1, token_ids, shared=shared, of_row=0)
        logits = models.ours.step({1: len(token_ids) - 64 * shared})[1]
        for mine, of_first in zip(models.ours.chosen[1], computed, strict=True):
            assert torch.equal(mine[64 * shared :], of_first[64 * shared :])
        expected = models.theirs.logits(token_ids, computed)
        assert (logits - expected[64 * shared :]).abs().max().item() <= TOLERANCE

    def test_through_the_engine_from_its_prefix_cache(self, models: Both) -> None:
        """The first answer is computed after a whole prompt, the second after cached blocks; the oracle says both."""
        prompt, num_tokens, vocab_size = models.case.tokens(4), 4, models.case.config().vocab_size
        options = {"dtype": "float32", "num_blocks": 40, "max_step_tokens": 200, "max_graph_tokens": 4}
        llm = LLM(models.folder, device=models.device, max_logprobs=vocab_size, **options)
        asked = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=vocab_size)
        for num_cached in (0, (len(prompt) - 1) // 64 * 64):
            (answer,) = llm.generate([prompt], asked)
            assert answer.num_cached_tokens == num_cached
            expected = models.theirs.logits([*prompt, *answer.token_ids[:-1]])[-num_tokens:].log_softmax(-1)
            ours = torch.tensor([[entry[token] for token in range(vocab_size)] for entry in answer.logprobs])
            assert (ours - expected).abs().max().item() <= TOLERANCE
            assert answer.token_ids == expected.argmax(-1).tolist()
