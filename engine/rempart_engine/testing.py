"""A runner without a model (deterministic tokens, real bookkeeping, faults on demand), and processes that serve it.

The model "file" is a small JSON object with the fields of `FakeModel`. The next token is a hash of seed, choice and all
tokens so far, so a test knows every output without a reference run. The runner keeps KV blocks as token ids and checks
that a sequence's block table holds exactly its tokens: a scheduler or prefix cache that mixes sequences up fails here.
"""

import os
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

import msgspec

from rempart_engine.config import BLOCK_SIZE, EngineConfig
from rempart_engine.core.request import SamplingParams
from rempart_engine.core.runner import DoneStep, LoadedModel
from rempart_engine.core.step import NewRow, RowResult, ScheduledRow, StepPlan, StepResult, TokenLogprob

FAKE_RUNNER = "rempart_engine.testing:load_fake_runner"


class FakeModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to pretend. Steps are counted from 1."""

    vocab_size: int = 1000
    max_model_len: int = 2048
    num_blocks: int = 256
    eos_token_id: int = 0
    """Only sampled where `num_tokens_to_eos` says so."""
    num_tokens_to_eos: int | None = None
    """Sequences end with the end-of-sequence token as soon as they have this many tokens."""
    step_s: float = 0.0
    """Time that every step takes."""
    load_gate: str | None = None
    """Loading goes on when this `Gate` is open."""
    step_gates: Mapping[int, str] = {}
    """By the number of a step: it goes on when this `Gate` is open."""
    load_error: str | None = None
    raise_at_step: int | None = None
    hang_at_step: int | None = None
    num_mtp_layers: int = 0
    """With some, drafts are proposed, of which three in four are right."""
    failing_token_id: int | None = None
    """A row that computes this token reports an error of its own."""

    def write(self, folder: Path) -> Path:
        """The model "file", to pass as `--model`."""
        path = folder / "fake.json"
        path.write_bytes(msgspec.json.encode(self))
        return path


class Gate:
    """Where a fake in another process waits until the test says go on: a pipe in `folder`. A context manager."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self.path = str(folder / name)
        os.mkfifo(self.path)
        self._pipe = os.open(self.path, os.O_RDWR)  # does not wait for the other end

    def open(self) -> None:
        """Lets one pass, whether it waits already or comes later."""
        os.write(self._pipe, b".")

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pipe)

    @staticmethod
    def wait(path: str) -> None:
        """What the fake does there."""
        with Path(path).open("rb", buffering=0) as pipe:
            pipe.read(1)


def fake_token(seed: int, choice: int, token_ids: Sequence[int], vocab_size: int) -> int:
    """The token that follows `token_ids`: in [1, vocab_size)."""
    hashed = blake2b(array("I", token_ids).tobytes(), key=b"%d/%d" % (seed, choice), digest_size=8)
    return 1 + int.from_bytes(hashed.digest(), "big") % (vocab_size - 1)


def fake_output(
    prompt_token_ids: Sequence[int], num_tokens: int, *, seed: int = 0, choice: int = 0, vocab_size: int = 1000
) -> list[int]:
    """The first output tokens of a choice."""
    token_ids = list(prompt_token_ids)
    for _ in range(num_tokens):
        token_ids.append(fake_token(seed, choice, token_ids, vocab_size))
    return token_ids[len(prompt_token_ids) :]


def load_fake_runner(config: EngineConfig, on_progress: Callable[[float], None]) -> LoadedModel:
    """Runner factory for `EngineConfig.runner`."""
    model = msgspec.json.decode(config.model.read_bytes(), type=FakeModel)
    if model.load_error is not None:
        raise ValueError(model.load_error)
    for fraction in (0.0, 0.5, 1.0):
        on_progress(fraction)
    if model.load_gate is not None:
        Gate.wait(model.load_gate)
    num_blocks = config.num_blocks or model.num_blocks
    return LoadedModel(
        runner=FakeRunner(model, num_blocks),
        model_name=config.served_model_name or config.model.stem,
        architecture="fake",
        vocab_size=model.vocab_size,
        max_model_len=config.max_model_len or model.max_model_len,
        eos_token_ids=(model.eos_token_id,),
        num_blocks=num_blocks,
        dtype="none",
        num_mtp_layers=model.num_mtp_layers,
    )


class BookkeepingError(Exception):
    """A plan contradicts what the runner knows."""


@dataclass(slots=True)
class _Row:
    token_ids: list[int]
    block_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    choice: int
    drafts: list[int] = field(default_factory=list)


class FakeRunner:
    """Keeps rows and KV blocks as a real runner does, with token ids in place of tensors."""

    def __init__(self, model: FakeModel, num_blocks: int, sleep: Callable[[float], object] = time.sleep) -> None:
        self._model = model
        self._sleep = sleep
        self._rows: dict[int, _Row] = {}
        self._blocks: list[list[int | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self._num_steps = 0

    @property
    def rows(self) -> Mapping[int, tuple[int, ...]]:
        """Tokens of each row that was not released."""
        return MappingProxyType({number: tuple(row.token_ids) for number, row in self._rows.items()})

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises BookkeepingError, or RuntimeError at `raise_at_step`."""
        self._num_steps += 1
        if self._num_steps == self._model.raise_at_step:
            raise RuntimeError(f"told to raise at step {self._num_steps}")
        while self._num_steps == self._model.hang_at_step:
            time.sleep(3600)
        if self._num_steps in self._model.step_gates:
            Gate.wait(self._model.step_gates[self._num_steps])
        self._sleep(self._model.step_s)
        for new_row in plan.new_rows:
            self._enter(new_row)
        return StepResult(plan.step, tuple(self._compute(scheduled) for scheduled in plan.rows))

    def launch(self, plan: StepPlan) -> DoneStep:
        return DoneStep(self.execute(plan))

    def release_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self._rows[row]

    def _enter(self, new_row: NewRow) -> None:
        if new_row.row in self._rows:
            raise BookkeepingError(f"row {new_row.row} starts but was not released")
        self._rows[new_row.row] = _Row(
            list(new_row.token_ids),
            list(new_row.block_ids),
            new_row.num_prompt_tokens,
            new_row.sampling,
            new_row.choice,
        )

    def _compute(self, scheduled: ScheduledRow) -> RowResult:
        row = self._rows[scheduled.row]
        row.block_ids += scheduled.new_block_ids
        if scheduled.num_draft_tokens > len(row.drafts):
            raise BookkeepingError(f"{scheduled.num_draft_tokens} drafts are planned, the row has {len(row.drafts)}")
        drafts, row.drafts = row.drafts[: scheduled.num_draft_tokens], []
        end = scheduled.start + scheduled.num_new_tokens - len(drafts)
        token_ids = [*row.token_ids[:end], *drafts]
        self._store(row, token_ids, scheduled.start)
        self._check_stored(row, token_ids)
        if self._model.failing_token_id in row.token_ids[scheduled.start : end]:
            return RowResult(scheduled.row, error="not a number in the logits")
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if scheduled.wants_prompt_logprobs:
            after = row.token_ids[scheduled.start + 1 : min(end + 1, row.num_prompt_tokens)]
            prompt_logprobs = tuple(_fake_logprob(t, row.sampling.prompt_logprobs or 0) for t in after)
        if not scheduled.samples:
            return RowResult(scheduled.row, prompt_logprobs=prompt_logprobs)
        sampled = self._verify(row, drafts)
        row.token_ids += sampled
        row.drafts = self._guess(row, scheduled.max_drafts)
        num_top = row.sampling.logprobs
        logprobs = () if num_top is None else tuple(_fake_logprob(token_id, num_top) for token_id in sampled)
        return RowResult(scheduled.row, tuple(sampled), logprobs, prompt_logprobs, num_proposed_drafts=len(row.drafts))

    def _verify(self, row: _Row, drafts: list[int]) -> list[int]:
        """The tokens that follow the row's, up to the first that differs from its draft."""
        sampled: list[int] = []
        for draft in (*drafts, None):
            sampled.append(self._next_token(row, [*row.token_ids, *sampled]))
            if sampled[-1] != draft:
                break
        return sampled

    def _guess(self, row: _Row, count: int) -> list[int]:
        token_ids = list(row.token_ids)
        for _ in range(count):
            right = self._next_token(row, token_ids)
            token_ids.append(right if right % 4 else (right + 1) % self._model.vocab_size)
        return token_ids[len(row.token_ids) :]

    def _next_token(self, row: _Row, token_ids: Sequence[int]) -> int:
        if self._model.num_tokens_to_eos is not None and len(token_ids) + 1 >= self._model.num_tokens_to_eos:
            return self._model.eos_token_id
        return fake_token(row.sampling.seed or 0, row.choice, token_ids, self._model.vocab_size)

    def _store(self, row: _Row, token_ids: Sequence[int], start: int) -> None:
        for position in range(start, len(token_ids)):
            self._blocks[row.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE] = token_ids[position]

    def _check_stored(self, row: _Row, token_ids: list[int]) -> None:
        stored = [self._blocks[row.block_ids[p // BLOCK_SIZE]][p % BLOCK_SIZE] for p in range(len(token_ids))]
        if stored != token_ids:
            raise BookkeepingError(f"KV blocks {row.block_ids} hold other tokens than their sequence's")


def _fake_logprob(token_id: int, num_alternatives: int) -> TokenLogprob:
    """The token itself as most likely, then the ids after it, each half as likely."""
    top_token_ids = tuple(token_id + rank for rank in range(num_alternatives))
    return TokenLogprob(-0.5, top_token_ids, tuple(-0.5 - 0.6931 * rank for rank in range(num_alternatives)))


class EngineUnderTest:
    """A real engine process with a fake model, as a context manager that leaves no process behind."""

    def __init__(self, model: FakeModel, folder: Path, *flags: str) -> None:
        self.log_path = folder / "engine.log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "rempart_engine", "--model", str(model.write(folder)), "--port", "0"),
                    *("--metrics-port", "0", "--runner", FAKE_RUNNER, "--num-threads", "1", *flags),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.loading: list[float] = []
        self.address = ""
        self.metrics_url = ""

    def wait_until_ready(self) -> None:
        """Read what the process says on stdout until it is ready; returns also when it ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = msgspec.json.decode(line, type=dict[str, object])
            if "ready" in said:
                self.address, self.metrics_url = str(said["address"]), str(said["metrics"])
                return
            self.loading.append(float(str(said["loading"])))

    def __enter__(self) -> "EngineUnderTest":
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # its core dies with it
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
