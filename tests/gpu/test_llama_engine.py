"""The engine on the GPU path with a small Llama, against transformers and against itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rempart_engine.core.request import FinishReason, Request, RequestId
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.gpu.runner import GpuRunner
from rempart_engine.model.errors import ModelError
from rempart_engine.model.llama import Llama
from rempart_engine.offline import LLM, Generation, SamplingParams

VOCAB_SIZE = 199
OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": "float32", "num_blocks": 12, "max_num_rows": 6}
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2)
PROMPTS = [
    [(7 * place + 3 * number) % VOCAB_SIZE for place in range(length)] for number, length in enumerate((70, 5, 1))
]


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train(mode=False)
    return model


@pytest.fixture(scope="module")
def folder(theirs: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(path)
    return path


def assert_as_oracle(theirs: LlamaForCausalLM, generations: list[Generation]) -> None:
    for generation in generations:
        prompt, output = list(generation.prompt_token_ids), generation.token_ids
        with torch.inference_mode():
            logprobs = theirs(torch.tensor([prompt + output])).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1]
        assert output == expected.argmax(-1).tolist()
        ours = torch.tensor([max(entry.values()) for entry in generation.logprobs])
        assert (ours - expected.amax(-1)).abs().max().item() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_graph_tokens": 4}, id="small steps from graphs"),
        pytest.param({"max_graph_tokens": 0, "max_step_tokens": 32}, id="in chunks, no graphs"),
        pytest.param({"max_graph_tokens": 2, "num_blocks": 3, "watermark": 0.0}, id="preempted in a small pool"),
    ],
)
def test_tokens_and_logprobs_are_those_of_transformers(
    theirs: LlamaForCausalLM, folder: Path, options: dict[str, Any]
) -> None:
    llm = LLM(folder, **{**OPTIONS, **options})
    assert_as_oracle(theirs, llm.generate(PROMPTS, GREEDY))
    again = llm.generate(PROMPTS[:1], GREEDY)
    assert again[0].num_cached_tokens == 64
    assert_as_oracle(theirs, again)


def test_prompt_logprobs_are_those_of_transformers(theirs: LlamaForCausalLM, folder: Path) -> None:
    llm = LLM(folder, **OPTIONS, max_graph_tokens=0)
    asked = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=1)
    (generation,) = llm.generate([PROMPTS[0]], asked)
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPTS[0]])).logits[0].log_softmax(-1)
    for place, entry in enumerate(generation.prompt_logprobs):
        assert abs(entry[PROMPTS[0][place + 1]] - expected[place, PROMPTS[0][place + 1]].item()) < 1e-4


SAMPLED = [
    SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=6, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0.8, top_k=20, presence_penalty=0.7, frequency_penalty=0.3, seed=4, max_tokens=6),
    SamplingParams(temperature=1.2, min_p=0.02, seed=5, min_tokens=3, max_tokens=6, logit_bias={5: 3.0}),
]


def test_sampled_texts_do_not_depend_on_company_or_graphs(folder: Path) -> None:
    """Steps are launched one ahead, so that penalties count tokens which the host has not seen yet."""
    alone = LLM(folder, **OPTIONS, max_graph_tokens=0)
    expected = [alone.generate([prompt], asked)[0] for prompt, asked in zip(PROMPTS, SAMPLED, strict=True)]
    together = LLM(folder, **OPTIONS, max_graph_tokens=4, enable_prefix_cache=False).generate(PROMPTS, SAMPLED)
    assert [each.token_ids for each in together] == [each.token_ids for each in expected]
    assert [each.finish_reason for each in together] == [each.finish_reason for each in expected]


@pytest.fixture
def lost_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The third forward pass finds no memory; the list has the numbers of tokens of all passes."""
    seen: list[int] = []
    forward = Llama.forward

    def with_one_loss(self: Llama, step: Any, storage: Any) -> torch.Tensor:
        seen.append(len(step.positions))
        if len(seen) == 3:
            raise torch.OutOfMemoryError("told to")
        return forward(self, step, storage)

    monkeypatch.setattr(Llama, "forward", with_one_loss)
    return seen


def test_out_of_memory_preempts_and_changes_no_text(
    theirs: LlamaForCausalLM, folder: Path, lost_step: list[int]
) -> None:
    llm = LLM(folder, **OPTIONS, max_graph_tokens=0)
    assert_as_oracle(theirs, llm.generate(PROMPTS, GREEDY))
    assert len(lost_step) > 3
    assert llm.load().counters.num_preemptions == 3


def test_a_row_that_is_not_finite_fails_alone(folder: Path) -> None:
    llm = LLM(folder, **OPTIONS, max_graph_tokens=0)
    runner = llm.model.runner
    assert isinstance(runner, GpuRunner)
    model = runner._model
    assert isinstance(model, Llama)
    model.embedding[17] = torch.nan
    scheduler: Scheduler = llm._scheduler
    good, bad = [1, 2, 3], [1, 17, 3]
    for name, prompt in (("good", good), ("bad", bad)):
        assert scheduler.add(Request(RequestId(name), tuple(prompt), GREEDY)) == []
    endings: dict[str, FinishReason | None] = {}
    tokens: dict[str, list[int]] = {"good": [], "bad": []}
    while scheduler.has_work:
        for event in llm._pipeline.advance()[1]:
            endings[event.request_id] = event.finish_reason
            tokens[event.request_id] += event.token_ids
    assert endings == {"good": FinishReason.LENGTH, "bad": FinishReason.ERROR}
    assert len(tokens["good"]) == 5
    assert tokens["bad"] == []


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_numbers_that_a_llama_cannot_have_are_refused_by_name(folder: Path, dtype: str) -> None:
    with pytest.raises(ModelError, match=f"dtype {dtype}"):
        LLM(folder, **{**OPTIONS, "dtype": dtype})


def test_the_cpu_is_refused_in_the_interpreter(folder: Path, device: torch.device) -> None:
    if device.type == "cuda":
        assert LLM(folder, **{**OPTIONS, "device": "cpu"}).generate([[1]], GREEDY)[0].token_ids
        return
    with pytest.raises(ModelError, match="TRITON_INTERPRET"):
        LLM(folder, **{**OPTIONS, "device": "cpu"})
