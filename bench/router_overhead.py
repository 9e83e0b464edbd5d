"""What the router costs: latency added before the first token, requests/s and streamed tokens/s per core.

    python bench/router_overhead.py [--quick] [--json FILE]

    this process: clients ──HTTP, gRPC──► router (a real process; Redis with keys and quotas) ──► fake engines
                     └───────────────────── gRPC, the engine's own Generate ─────────────────────────┘

Every answer is checked, token by token, before a figure is printed; at the end the tenant must have been charged
exactly the tokens that came. Rates are given per CPU second of the router's process, threads and system time
included, since on a small machine clients, engines and Redis want the same cores: `busy` says who was at its limit.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when run as a script

import uvloop
from bench.bundled_model import bundled_model
from bench.clients import Client, EngineClient, GrpcClient, HttpClient, Reply
from bench.conversation import Conversation, WrongOutputError, conversations
from bench.report import describe, percentile, table, this_machine, versions, write_json
from bench.router_rig import CpuClock, FakeModel, Rig, RigError, running_rig

from rempart_platform.models import ServedModel, load_served_model

FAST, PACED = FakeModel("fast", step_ms=1.0), FakeModel("paced", step_ms=20.0)
_NUM_VARIANTS = 16
_BUSY_CORES = 0.9
_ROLES = ("router", "client", "engines", "redis")


@dataclass(frozen=True, slots=True)
class Load:
    """Clients that ask again as soon as they have their answer."""

    name: str
    model: FakeModel
    is_grpc: bool
    is_stream: bool
    num_clients: int
    num_output_tokens: int


LOADS = (
    Load("HTTP, whole answers", FAST, False, False, 32, 8),
    Load("gRPC, short streams", FAST, True, True, 32, 8),
    Load("HTTP streams, flat out", FAST, False, True, 32, 128),
    Load("gRPC streams, flat out", FAST, True, True, 32, 128),
    Load("HTTP streams, flat out", FAST, False, True, 256, 256),
    Load("gRPC streams, flat out", FAST, True, True, 256, 256),
    Load("HTTP streams, 50 tokens/s each", PACED, False, True, 32, 64),
    Load("gRPC streams, 50 tokens/s each", PACED, True, True, 32, 64),
)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one load brought. Cores: CPU seconds a second."""

    load: Load
    seconds: float
    num_requests: int
    num_tokens: int
    num_pieces: int
    """Messages or events that brought tokens; a router that is behind joins tokens to fewer of them."""
    first_token_p50_s: float
    first_token_p99_s: float
    cores: dict[str, float]
    """Of "router", "engines", "redis" and "client"."""

    @property
    def requests_per_s(self) -> float:
        return self.num_requests / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def busy(self, num_cores: int) -> str:
        """Who was at its limit: one event loop cannot use more than a core."""
        roles = [role for role, cores in self.cores.items() if cores >= _BUSY_CORES]
        if sum(self.cores.values()) >= _BUSY_CORES * num_cores:
            roles.append("all cores")
        return ", ".join(roles) or "nobody"


@dataclass(frozen=True, slots=True)
class Latency:
    """Times to the first token, one request at a time, the three ways in turn."""

    direct_s: list[float]
    http_s: list[float]
    grpc_s: list[float]


async def measure_latency(rig: Rig, asked: Sequence[Conversation], num_rounds: int) -> tuple[Latency, int]:
    """Also returns the number of tokens that came through the router."""
    direct: Client = EngineClient(rig.engine_addresses[FAST.name])
    http: Client = await HttpClient.connect(rig.http_port, FAST.name, rig.key, stream=True)
    grpc: Client = GrpcClient(rig.grpc_address, FAST.name, rig.key)
    clients = (direct, http, grpc)
    replies: list[list[Reply]] = [[], [], []]
    num_warm_up = max(num_rounds // 10, 5)
    for number in range(num_warm_up + num_rounds):
        for client, of_client in zip(clients, replies, strict=True):
            of_client.append(await client.ask(asked[number % len(asked)]))
    for client in clients:
        await client.close()
    _check([reply for of_client in replies for reply in of_client])
    num_tokens = sum(len(reply.asked.token_ids) for of_client in replies[1:] for reply in of_client)
    times = [[reply.first_token_s for reply in of_client[num_warm_up:]] for of_client in replies]
    return Latency(*times), num_tokens


async def measure_load(
    rig: Rig, clock: CpuClock, load: Load, asked: Sequence[Conversation], duration_s: float
) -> LoadResult:
    """New requests start for `duration_s`; all of them are waited for and counted."""
    clients = [await _connect(rig, load) for _ in range(load.num_clients)]
    before, started = clock.read(), time.perf_counter()
    replies_of_each = await asyncio.gather(
        *(_ask_until(client, asked, number, started + duration_s) for number, client in enumerate(clients))
    )
    seconds = time.perf_counter() - started
    after = clock.read()
    for client in clients:
        await client.close()
    replies = [reply for replies in replies_of_each for reply in replies]
    first_token_s = [reply.first_token_s for reply in replies]
    return LoadResult(
        load=load,
        seconds=seconds,
        num_requests=len(replies),
        num_tokens=sum(len(reply.asked.token_ids) for reply in replies),
        num_pieces=_check(replies),
        first_token_p50_s=percentile(first_token_s, 50),
        first_token_p99_s=percentile(first_token_s, 99),
        cores={role: (after[role] - before[role]) / seconds for role in after},
    )


async def _connect(rig: Rig, load: Load) -> Client:
    if load.is_grpc:
        return GrpcClient(rig.grpc_address, load.model.name, rig.key)
    return await HttpClient.connect(rig.http_port, load.model.name, rig.key, stream=load.is_stream)


async def _ask_until(client: Client, asked: Sequence[Conversation], first: int, end: float) -> list[Reply]:
    replies: list[Reply] = []
    while time.perf_counter() < end:
        replies.append(await client.ask(asked[(first + len(replies)) % len(asked)]))
    return replies


def _check(replies: Sequence[Reply]) -> int:
    """Checks all answers; the number of pieces in which they came."""
    return sum(reply.check() for reply in replies)


def latency_table(latency: Latency) -> str:
    """Milliseconds to the first token."""
    head = ["first token, ms", "engine p50", "router p50", "added p50", "engine p99", "router p99", "added p99"]
    rows = []
    for name, through in (("HTTP stream", latency.http_s), ("gRPC stream", latency.grpc_s)):
        cells = []
        for percent in (50, 99):
            direct_s, router_s = percentile(latency.direct_s, percent), percentile(through, percent)
            cells += [f"{1000 * spent_s:.2f}" for spent_s in (direct_s, router_s, router_s - direct_s)]
        rows.append([name, *cells])
    return table(head, rows)


def load_table(results: Sequence[LoadResult], num_cores: int) -> str:
    """Rates, and rates per core of the router."""
    head = ["load", "requests/s", "tokens/s", "tokens/piece", "requests/s/core", "tokens/s/core"]
    head += ["first token p50", "p99", f"cores of {', '.join(_ROLES)}", "busy"]
    rows = []
    for result in results:
        of_router = result.cores["router"]
        rows.append(
            [
                f"{result.load.name} (x{result.load.num_clients}, {result.load.num_output_tokens} out)",
                f"{result.requests_per_s:,.0f}",
                f"{result.tokens_per_s:,.0f}",
                f"{result.num_tokens / result.num_pieces:.1f}",
                f"{result.requests_per_s / of_router:,.0f}",
                f"{result.tokens_per_s / of_router:,.0f}",
                f"{1000 * result.first_token_p50_s:.1f} ms",
                f"{1000 * result.first_token_p99_s:.1f} ms",
                "  ".join(f"{result.cores[role]:.2f}" for role in _ROLES),
                result.busy(num_cores),
            ]
        )
    return table(head, rows)


def results_json(latency: Latency, results: Sequence[LoadResult], num_cores: int) -> dict[str, object]:
    """The same for programs."""
    percents = (50, 90, 99)
    times = {"engine": latency.direct_s, "http": latency.http_s, "grpc": latency.grpc_s}
    return {
        "bench": "router_overhead",
        "versions": versions("grpcio", "uvicorn", "uvloop", "httptools", "starlette", "redis", "hiredis", "protobuf"),
        "first_token_s": {name: {f"p{p}": percentile(of_way, p) for p in percents} for name, of_way in times.items()},
        "num_latency_rounds": len(latency.direct_s),
        "loads": [
            asdict(result)
            | {
                "requests_per_s": result.requests_per_s,
                "tokens_per_s": result.tokens_per_s,
                "requests_per_router_core_s": result.requests_per_s / result.cores["router"],
                "tokens_per_router_core_s": result.tokens_per_s / result.cores["router"],
                "busy": result.busy(num_cores),
            }
            for result in results
        ],
    }


async def measure(
    rig: Rig, model: ServedModel, *, num_rounds: int, duration_s: float
) -> tuple[Latency, list[LoadResult]]:
    """Latency, then every load. Raises WrongOutputError, also when another number of tokens was charged."""
    clock = CpuClock(rig.pids)
    latency, num_tokens = await measure_latency(rig, conversations(model, 4, _NUM_VARIANTS), num_rounds)
    results = []
    for load in LOADS:
        _note(load.name)
        asked = conversations(model, load.num_output_tokens, _NUM_VARIANTS)
        results.append(await measure_load(rig, clock, load, asked, duration_s))
    num_tokens += sum(result.num_tokens for result in results)
    num_charged = await rig.charged_tokens()
    if num_charged != num_tokens:
        raise WrongOutputError(f"{num_tokens} tokens came and {num_charged} were charged")
    return latency, results


async def run(args: argparse.Namespace) -> None:
    """Starts everything, measures, prints."""
    machine = this_machine()
    print(f"{describe(machine)}\n", flush=True)
    model = load_served_model(args.tokenizer, name="model", max_model_len=4096, created_s=0)
    num_rounds, duration_s = (30, 0.5) if args.quick else (500, 6.0)
    async with running_rig(args.tokenizer, model.vocab_size, (FAST, PACED)) as rig:
        latency, results = await measure(rig, model, num_rounds=num_rounds, duration_s=duration_s)
    smoke = ": A SMOKE TEST, NO MEASUREMENT" if args.quick else ""
    print(f"router with keys and quotas over fake engines; {num_rounds} rounds one at a time{smoke}\n")
    print(latency_table(latency))
    print(f"\n{duration_s} s a load; all answers were checked and charged to the token\n")
    print(load_table(results, machine.cores))
    if args.json:
        write_json(args.json, machine, results_json(latency, results, machine.cores))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """The command line."""
    model = bundled_model()
    parser = argparse.ArgumentParser(description="What the router costs, over fake engines.", allow_abbrev=False)
    parser.add_argument(
        "--tokenizer", type=Path, default=model, required=model is None, help="GGUF file or folder of a ChatML model"
    )
    parser.add_argument("--quick", action="store_true", help="moments of each load: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that the processes are stopped
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(args))
    except (RigError, WrongOutputError) as error:
        sys.exit(f"no figure is reported: {error}")


if __name__ == "__main__":
    main()
