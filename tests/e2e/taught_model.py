"""A tiny DeepSeek-V3.2 that knows a few conversations by heart, in the published layout and with the real tokenizer.

    python tests/e2e/taught_model.py FOLDER TOKENIZER_FOLDER

Only the layers are taught, and of the vocabulary the rows that the conversations use. All other rows of the head are
zero: what was never learned is never said. The MTP layer is random: its drafts are made, verified and refused.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rempart_engine.model.deepseek.config import DeepseekConfig, IndexerConfig, MoEConfig, YarnScaling
from rempart_engine.model.deepseek.names import TensorSpec
from rempart_engine.model.deepseek.testing import (
    oracle,
    random_values,
    store_checkpoint,
    tensors_of,
    write_checkpoint,
)
from rempart_platform.chat.deepseek_profile import V32
from rempart_platform.chat.deepseek_tags import END_THINK, EOS
from rempart_platform.chat.deepseek_v32 import DeepSeekV32
from rempart_platform.chat.dsml import calls_block
from rempart_platform.chat.message import Conversation, Message, Tool, ToolCall
from rempart_platform.chat.prompt import Piece, encode_pieces
from rempart_platform.chat.turns import Call
from rempart_platform.text.from_folder import load_folder
from rempart_platform.text.tokenizer import Tokenizer

QUESTION = Message("user", "What is the capital of France?")
ANSWER = Message("assistant", "The capital of France is Paris.")
THOUGHTFUL_ANSWER = Message("assistant", "It is Paris.", "France is a country in Europe. Its capital is Paris.")

TOOL = Tool(
    "get_forecast",
    "Weather of the next days.",
    json.dumps(
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        }
    ),
)
ORDER = Message("user", "What will the weather be in Paris for 3 days?")
_CALLS = (ToolCall("call_1", TOOL.name, '{"city": "Paris", "days": 3}'),)
CALLING = Message("assistant", "Let me see.", tool_calls=_CALLS)
THOUGHTFUL_CALLING = Message("assistant", "", "They ask for a forecast, so I call the tool.", tool_calls=_CALLS)
RESULT = Message("tool", '{"sky": "rain", "celsius": 12}', tool_call_id="call_1")
LAST_ANSWER = Message("assistant", "Take an umbrella: rain at 12 degrees for 3 days.", "The tool says rain.")

TEXT = "A rempart is"
CONTINUATION = " a wall around the words of its tenants."

CONFIG = DeepseekConfig(
    architecture="DeepseekV32ForCausalLM",
    vocab_size=129_280,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_dense_layers=1,
    num_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=YarnScaling(factor=40.0, original_max_position_embeddings=4096),
    max_model_len=163_840,
    moe=MoEConfig(
        num_experts=4,
        num_shared_experts=1,
        num_experts_per_token=2,
        intermediate_size=32,
        num_groups=2,
        num_chosen_groups=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    # The prompts with a tool are several times longer than top_k. So many heads leave no token without a score.
    indexer=IndexerConfig(num_heads=9, head_dim=32, top_k=128, rope="half-split", is_full=(True, True)),
    num_mtp_layers=1,
    bos_token_id=0,
    eos_token_ids=(1,),
)
_SEED = 1
_NUM_STEPS = 200
_LEARNING_RATE = 5e-3
_NOISE = 0.05
"""Weights are shaken by this much while they learn, so that rounding to bfloat16 or fp8 changes no word later."""
_WANTED_MARGIN, _LEAST_MARGIN = 6.0, 3.0
"""By how much each right token's logit should lead, and must."""
_MARGIN_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Lesson:
    """Token ids to be said after others."""

    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt, *self.answer]


@dataclass(frozen=True, slots=True)
class _Page:
    """One sequence to compute, and which of its tokens are answers."""

    token_ids: torch.Tensor  # [1, S], of the words that are taught
    places: torch.Tensor  # [A], of the tokens before those of the answers

    @property
    def answers(self) -> torch.Tensor:  # [A]
        return self.token_ids[0, self.places + 1]


def write_taught_model(folder: Path, tokenizer_folder: Path) -> None:
    """Teach the model, and write it with its tokenizer; takes half a minute.

    Args:
        folder: for the model.
        tokenizer_folder: holds the tokenizer.json and tokenizer_config.json of DeepSeek's V3 series.

    Raises:
        RuntimeError: it has not learned its lessons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _copy_tokenizer(tokenizer_folder, folder)
    lessons = all_lessons(load_folder(folder).tokenizer)
    words = torch.tensor(sorted({token_id for lesson in lessons for token_id in lesson.token_ids}))
    taught = _taught(lessons, words)
    random = random_values(_SEED)

    def values(name: str, spec: TensorSpec) -> torch.Tensor:
        if name not in taught:
            return random(name, spec)
        if name not in ("embed_tokens.weight", "lm_head.weight"):
            return taught[name]
        whole = torch.zeros(spec.shape)
        whole[words] = taught[name]
        return whole

    store_checkpoint(folder, CONFIG, values)


def all_lessons(tokenizer: Tokenizer) -> list[Lesson]:
    """What the model is to know."""
    tools = (TOOL,)
    conversations = [
        (Conversation((QUESTION,)), ANSWER),
        (Conversation((QUESTION,), thinking=True), THOUGHTFUL_ANSWER),
        (Conversation((ORDER,), tools), CALLING),
        (Conversation((ORDER,), tools, thinking=True), THOUGHTFUL_CALLING),
        (Conversation((ORDER, THOUGHTFUL_CALLING, RESULT), tools, thinking=True), LAST_ANSWER),
    ]
    chat = DeepSeekV32(tokenizer, V32)
    eos = tokenizer.special_token_id(EOS.name)
    raw = Lesson(tokenizer.encode(TEXT, add_special=True), [*tokenizer.encode(CONTINUATION), eos])
    return [raw, *(Lesson(chat.render(asked), _answer(answer, tokenizer)) for asked, answer in conversations)]


def _answer(answer: Message, tokenizer: Tokenizer) -> list[int]:
    calls = [Call(call.name, call.arguments, json.loads(call.arguments)) for call in answer.tool_calls]
    thought: list[Piece] = [answer.reasoning, END_THINK] if answer.reasoning else []
    return encode_pieces([*thought, answer.content, *calls_block(calls), EOS], tokenizer)


def _copy_tokenizer(source: Path, target: Path) -> None:
    """As V3.2 is published: without a chat template, and with BOS before raw text."""
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    fields = json.loads((source / "tokenizer_config.json").read_bytes())
    del fields["chat_template"]
    (target / "tokenizer_config.json").write_text(json.dumps(fields | {"add_bos_token": True}))


def _taught(lessons: Sequence[Lesson], words: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of a model whose vocabulary is `words` [W], ascending token ids."""
    config = replace(CONFIG, vocab_size=len(words), num_mtp_layers=0)
    pages = _pages(lessons, words)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, dtype="float32", seed=_SEED)
        model = oracle(Path(folder)).train()
    with _one_thread():
        _learn(model, pages)
        margin = _margin(model, pages)
    if margin < _LEAST_MARGIN:
        raise RuntimeError(f"a right token leads by {margin:.2f} only, it should by {_LEAST_MARGIN}")
    return {name: tensor.detach() for name, tensor in tensors_of(model).items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors are too small to share, and sums in another order would teach another model."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _pages(lessons: Iterable[Lesson], words: torch.Tensor) -> list[_Page]:
    """A lesson that begins like a longer one is learned together with it."""
    wholes: list[list[int]] = []
    places: list[list[int]] = []
    for lesson in sorted(lessons, key=lambda each: len(each.token_ids), reverse=True):
        token_ids = lesson.token_ids
        found = [at for at, whole in enumerate(wholes) if whole[: len(token_ids)] == token_ids]
        if not found:
            found = [len(wholes)]
            wholes.append(token_ids)
            places.append([])
        places[found[0]] += range(len(lesson.prompt) - 1, len(token_ids) - 1)
    return [
        _Page(torch.searchsorted(words, torch.tensor([whole])), torch.tensor(sorted(own)))
        for whole, own in zip(wholes, places, strict=True)
    ]


def _learn(model: nn.Module, pages: Sequence[_Page]) -> None:
    generator = torch.Generator().manual_seed(_SEED)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(parameters.values())
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_NUM_STEPS)
    answers = torch.cat([page.answers for page in pages])
    for _ in range(_NUM_STEPS):
        shaken = {
            name: weight * (1 + _NOISE * torch.randn(weight.shape, generator=generator))
            for name, weight in parameters.items()
        }
        logits = torch.cat([_logits(model, shaken, page) for page in pages])
        optimizer.zero_grad()
        torch.autograd.backward(_loss(logits, answers))
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        pace.step()


def _loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Cross entropy teaches the many; the hinge goes on with the few that do not lead by enough."""
    hinge = nn.functional.multi_margin_loss(logits, answers, margin=_WANTED_MARGIN) * logits.shape[1]
    return nn.functional.cross_entropy(logits, answers) + _MARGIN_WEIGHT * hinge


def _logits(model: nn.Module, parameters: Mapping[str, torch.Tensor], page: _Page) -> torch.Tensor:  # [A, W + 1]
    """Of the words, and at last of all others, whose logits are 0, together."""
    arguments = {"use_cache": False, "logits_to_keep": page.places}
    logits = torch.func.functional_call(model, dict(parameters), (page.token_ids,), arguments).logits[0]
    others = math.log(CONFIG.vocab_size - logits.shape[1])
    return torch.cat([logits, torch.full((len(logits), 1), others)], 1)


@torch.inference_mode()
def _margin(model: nn.Module, pages: Sequence[_Page]) -> float:
    """The least lead of a right token's logit."""
    parameters = dict(model.named_parameters())
    logits = torch.cat([_logits(model, parameters, page) for page in pages])
    answers = torch.cat([page.answers for page in pages])[:, None]
    others = logits.scatter(1, answers, -math.inf)
    return float((logits.gather(1, answers)[:, 0] - others.amax(1)).min())


if __name__ == "__main__":
    write_taught_model(Path(sys.argv[1]), Path(sys.argv[2]))
