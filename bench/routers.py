"""Our router beside the peers': requests/s, added latency and streamed tokens/s, each on one core, in the same run.

    python bench/routers.py [--peers VENV] [--quick] [--json FILE]

    one core: the router whose turn it is, the others stopped        the other core: clients, backend, Redis
    clients ──HTTP──► Rempart ──gRPC session──┐
       ├─────HTTP──► LiteLLM ──HTTP───────────┼─► one fake backend, which answers alike over both protocols
       ├─────HTTP──► vllm-router ──HTTP───────┤
       └─────HTTP─────────────────────────────┘

Every answer is checked, token by token, before a figure is printed; one wrong answer, and none is. Ours does all its
work: keys, quotas, fair queue, settling to the token, audit log, metrics, logs. LiteLLM checks its master key.
vllm-router has neither keys nor limits.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

import uvloop
from bench.bundled_model import bundled_model
from bench.clients import HttpClient, Reply
from bench.conversation import Conversation, WrongOutputError, plain_conversations
from bench.report import ROOT, describe, percentile, table, this_machine, versions, write_json
from bench.router_rig import RigError, module_process
from bench.routers_backend import MODEL, Answer, write_answers
from bench.routers_contestants import Contestant, litellm, peer_versions, peers_folder, rempart, vllm_router
from bench.streams import Script, Streams

from rempart_platform.models import ServedModel, load_served_model

_NUM_VARIANTS = 16
_NUM_SHORT_TOKENS, _NUM_LONG_TOKENS = 8, 256
_NUM_STREAMS = 256
_NUM_CLIENTS = (16, 64)
_BUSY_CORES = 0.9
_TIME_LIMIT_S = 350.0
_DIRECT = "backend itself"


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each part of a round takes."""

    num_rounds: int
    num_asked: int
    """One at a time, for latency."""
    requests_s: float
    warm_up_s: float
    """Of streams, before the window."""
    streams_s: float


_PLAN, _QUICK = Plan(3, 100, 3.0, 4.0, 5.0), Plan(1, 10, 0.5, 2.0, 1.0)


@dataclass(frozen=True, slots=True)
class Round:
    """One router's turn."""

    router: str
    direct_p50_s: float
    """First token from the backend itself."""
    direct_p99_s: float
    router_p50_s: float
    router_p99_s: float
    requests_per_s: dict[int, float]
    """By the number of clients."""
    tokens_per_s: float
    busy_cores: float
    """CPU seconds a second of the router while it streamed."""
    busy_cores_of_requests: float
    """And while it answered the most clients."""

    @property
    def added_p50_s(self) -> float:
        return self.router_p50_s - self.direct_p50_s

    @property
    def added_p99_s(self) -> float:
        return self.router_p99_s - self.direct_p99_s


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked: short chats, and long ones as scripts for each router."""

    short: list[Conversation]
    long: list[Conversation]
    pieces: dict[int, tuple[str, ...]]
    """Of long answers, by seed; a short one is the beginning of the long one."""

    @classmethod
    def of(cls, model: ServedModel) -> "Asked":
        short = plain_conversations(model, _NUM_SHORT_TOKENS, _NUM_VARIANTS)
        long = plain_conversations(model, _NUM_LONG_TOKENS, _NUM_VARIANTS)
        pieces = {asked.seed: tuple(model.tokenizer.decode([token]) for token in asked.token_ids) for asked in long}
        return cls(short, long, pieces)

    def scripts(self, key: str) -> list[Script]:
        return [Script.of(asked, self.pieces[asked.seed], MODEL, key) for asked in self.long]

    def answers(self) -> dict[int, Answer]:
        return {
            asked.seed: Answer(asked.token_ids, self.pieces[asked.seed], len(asked.prompt_token_ids))
            for asked in self.long
        }


async def measure_round(contestant: Contestant, backend_port: int, asked: Asked, plan: Plan) -> Round:
    """Its whole turn. Raises WrongOutputError."""
    direct, through = await _first_tokens(contestant, backend_port, asked.short, plan.num_asked)
    requests_per_s, busy = {}, 0.0
    for num_clients in _NUM_CLIENTS:
        requests_per_s[num_clients], busy = await _requests(contestant, asked.short, num_clients, plan.requests_s)
    tokens_per_s, busy_streaming = await _stream(contestant, asked, plan)
    return Round(
        contestant.name,
        *(percentile(direct, 50), percentile(direct, 99), percentile(through, 50), percentile(through, 99)),
        requests_per_s,
        tokens_per_s,
        busy_streaming,
        busy,
    )


async def _first_tokens(
    contestant: Contestant, backend_port: int, asked: Sequence[Conversation], number: int
) -> tuple[list[float], list[float]]:
    """Seconds to the first token, from the backend itself and through the router, in turn."""
    clients = [
        await HttpClient.connect(backend_port, MODEL, "none", stream=True),
        await HttpClient.connect(contestant.port, MODEL, contestant.key, stream=True),
    ]
    replies: list[list[Reply]] = [[], []]
    num_warm_up = max(number // 10, 5)
    for turn in range(num_warm_up + number):
        for client, of_client in zip(clients, replies, strict=True):
            of_client.append(await client.ask(asked[turn % len(asked)]))
    for client in clients:
        await client.close()
    _check([reply for of_client in replies for reply in of_client])
    direct, through = ([reply.first_token_s for reply in of_client[num_warm_up:]] for of_client in replies)
    return direct, through


async def _requests(
    contestant: Contestant, asked: Sequence[Conversation], num_clients: int, duration_s: float
) -> tuple[float, float]:
    """Whole answers/s, of clients that ask again as soon as they have theirs; and CPU seconds a second."""
    clients = [
        await HttpClient.connect(contestant.port, MODEL, contestant.key, stream=False) for _ in range(num_clients)
    ]
    cpu_s, started = contestant.cpu_s(), time.perf_counter()

    async def ask_on(client: HttpClient, first: int) -> list[Reply]:
        replies: list[Reply] = []
        while time.perf_counter() < started + duration_s:
            replies.append(await client.ask(asked[(first + len(replies)) % len(asked)]))
        return replies

    of_each = await asyncio.gather(*(ask_on(client, number) for number, client in enumerate(clients)))
    seconds = time.perf_counter() - started
    spent_s = contestant.cpu_s() - cpu_s
    for client in clients:
        await client.close()
    replies = [reply for replies in of_each for reply in replies]
    _check(replies)
    return len(replies) / seconds, spent_s / seconds


async def _stream(contestant: Contestant, asked: Asked, plan: Plan) -> tuple[float, float]:
    """Tokens/s of many streams at once, and CPU seconds a second."""
    streams = await Streams.connect(contestant.port, asked.scripts(contestant.key), _NUM_STREAMS)
    try:
        await asyncio.sleep(plan.warm_up_s)
        cpu_s = contestant.cpu_s()
        counting = asyncio.create_task(streams.measure(plan.streams_s))
        await asyncio.sleep(plan.streams_s)
        spent_s = contestant.cpu_s() - cpu_s
        window = await counting
    finally:
        streams.close()
    return window.tokens_per_s, spent_s / plan.streams_s


def _check(replies: Sequence[Reply]) -> None:
    for reply in replies:
        reply.check()


@asynccontextmanager
async def _running(
    args: argparse.Namespace, model: ServedModel, asked: Asked, venv: Path, installed: Mapping[str, str]
) -> AsyncIterator[tuple[list[Contestant], int]]:
    """The backend and all routers there are, stopped; and the backend's port."""
    router_core, load_core = (frozenset({core}) for core in sorted(os.sched_getaffinity(0))[:2])
    os.sched_setaffinity(0, load_core)
    async with AsyncExitStack() as stack:
        answers = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rempart-bench-"))) / "answers.json"
        write_answers(answers, asked.answers())
        path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
        backend_args = ["bench.routers_backend", str(answers), "--vocab-size", str(model.vocab_size)]
        backend = module_process(backend_args, {"PYTHONPATH": path}, cores=load_core)
        line, _ = await stack.enter_async_context(backend)
        port, core, warm_up = int(line["port"]), router_core, asked.short[0]
        contestants = [await stack.enter_async_context(rempart(args.tokenizer, line["address"], core))]
        stack.callback(_go_on, contestants)
        contestants[-1].stop()
        for name, peer in (("litellm", litellm), ("vllm-router", vllm_router)):
            if name in installed:
                contestants.append(await stack.enter_async_context(peer(venv, port, warm_up, core)))
                contestants[-1].stop()
        yield contestants, port


def _go_on(contestants: Sequence[Contestant]) -> None:
    """So that they can end."""
    for contestant in contestants:
        contestant.go_on()


async def measure(contestants: Sequence[Contestant], backend_port: int, asked: Asked, plan: Plan) -> list[Round]:
    """All rounds, in each of which every router has its turn; the first begins with another each time."""
    rounds = []
    for number in range(plan.num_rounds):
        first = number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            _note(f"round {number + 1}: {contestant.name}")
            contestant.go_on()
            await contestant.wait_until_right(asked.short[0])
            rounds.append(await measure_round(contestant, backend_port, asked, plan))
            contestant.stop()
    return rounds


@dataclass(frozen=True, slots=True)
class Medians:
    """Of a router's rounds."""

    router: str
    added_p50_s: float
    added_p99_s: float
    requests_per_s: dict[int, float]
    tokens_per_s: float
    busy_cores: float
    busy_cores_of_requests: float

    @classmethod
    def of(cls, name: str, rounds: Sequence[Round]) -> "Medians":
        own = [each for each in rounds if each.router == name]
        return cls(
            name,
            median(each.added_p50_s for each in own),
            median(each.added_p99_s for each in own),
            {number: median(each.requests_per_s[number] for each in own) for number in _NUM_CLIENTS},
            median(each.tokens_per_s for each in own),
            median(each.busy_cores for each in own),
            median(each.busy_cores_of_requests for each in own),
        )


def result_table(medians: Sequence[Medians]) -> str:
    """Rates with ours over theirs, and who was at the limit of its core."""
    ours = medians[0]
    head = ["router on one core", "first token + p50", "+ p99"]
    head += [f"requests/s, {number} clients" for number in _NUM_CLIENTS]
    head += [f"tokens/s, {_NUM_STREAMS} streams", "ours / this: requests", "tokens", "busy: requests", "tokens"]
    rows = []
    for each in medians:
        most = _NUM_CLIENTS[-1]
        rows.append(
            [
                each.router,
                f"{1000 * each.added_p50_s:.2f} ms",
                f"{1000 * each.added_p99_s:.2f} ms",
                *(f"{each.requests_per_s[number]:,.0f}" for number in _NUM_CLIENTS),
                f"{each.tokens_per_s:,.0f}",
                _ratio(ours.requests_per_s[most], each.requests_per_s[most]),
                _ratio(ours.tokens_per_s, each.tokens_per_s),
                f"{each.busy_cores_of_requests:.2f}",
                f"{each.busy_cores:.2f}",
            ]
        )
    return table(head, rows)


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if theirs else "nothing came"


async def run(args: argparse.Namespace) -> None:
    """Starts everything, measures, prints."""
    if len(os.sched_getaffinity(0)) < 2:
        raise RigError("a router and its load need a core each, and there is one")
    machine = this_machine()
    print(f"{describe(machine)}\n", flush=True)
    model = load_served_model(args.tokenizer, name=MODEL, max_model_len=4096, created_s=0)
    plan = _QUICK if args.quick else _PLAN
    asked = Asked.of(model)
    async with asyncio.timeout(_TIME_LIMIT_S), peers_folder(args.peers) as venv:
        installed = peer_versions(venv)
        async with _running(args, model, asked, venv, installed) as (contestants, backend_port):
            rounds = await measure(contestants, backend_port, asked, plan)
    for missing in {"litellm", "vllm-router"} - installed.keys():
        print(f"{missing} could not be installed and is not measured")
    medians = [Medians.of(contestant.name, rounds) for contestant in contestants]
    smoke = ": A SMOKE TEST, NO MEASUREMENT" if args.quick else ""
    peers = ", ".join(f"{name} {version}" for name, version in sorted(installed.items()))
    print(f"{peers}; medians of {plan.num_rounds} rounds; all answers were checked{smoke}")
    print(f"answers of {_NUM_SHORT_TOKENS} tokens, streams of {_NUM_LONG_TOKENS}; added to what the backend takes\n")
    print(result_table(medians))
    if args.json:
        results = {
            "bench": "routers",
            "versions": {**versions("grpcio", "uvicorn", "uvloop", "httptools", "starlette", "redis"), **installed},
            "plan": asdict(plan),
            "rounds": [asdict(each) for each in rounds],
            "medians": [asdict(each) for each in medians],
        }
        write_json(args.json, machine, results)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """The command line."""
    model = bundled_model()
    parser = argparse.ArgumentParser(description="Our router beside the peers', one core each.", allow_abbrev=False)
    parser.add_argument(
        "--tokenizer", type=Path, default=model, required=model is None, help="GGUF file or folder of a ChatML model"
    )
    parser.add_argument("--peers", type=Path, metavar="VENV", help="where the peers are installed; else a new one")
    parser.add_argument("--quick", action="store_true", help="moments of each load: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that the processes are stopped
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(args))
    except TimeoutError:
        sys.exit(f"no figure is reported: it took longer than {_TIME_LIMIT_S:.0f} s")
    except (RigError, WrongOutputError) as error:
        sys.exit(f"no figure is reported: {error}")


if __name__ == "__main__":
    main()
