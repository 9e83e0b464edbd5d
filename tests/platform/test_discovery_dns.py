"""Endpoints from a name, looked up again and again."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from rempart_platform.cluster.testing import Told
from rempart_platform.endpoints.discovery import DnsConfig
from rempart_platform.endpoints.dns import DnsSource, Resolve

Answer = frozenset[str] | OSError


class Resolver:
    """Gives one answer after the other, and the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, name: str, port: int) -> frozenset[str]:
        self.asked.append((name, port))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


@asynccontextmanager
async def following(name: str, resolve: Resolve | None) -> AsyncIterator[tuple[DnsSource, Told]]:
    told = Told()
    source = DnsSource(name, 50051, DnsConfig(period_s=0.01), told, resolve)
    task = asyncio.create_task(source.run(told))
    try:
        yield source, told
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


NO_NAME = socket.gaierror(socket.EAI_NONAME, "no such name")
NO_ANSWER = socket.gaierror(socket.EAI_AGAIN, "no server answers")
ONE, TWO = frozenset({"10.0.0.1:50051"}), frozenset({"10.0.0.1:50051", "[fd00::1]:50051"})


async def test_every_change_of_the_records_is_told() -> None:
    resolver = Resolver(ONE, TWO)
    async with following("engines.llm.svc", resolver) as (source, told):
        await told.wait_for(lambda told: bool(told.sets) and told.sets[-1].serving == TWO)
        assert told.sets[0].serving == ONE
        assert source.has_synced
        assert set(resolver.asked) == {("engines.llm.svc", 50051)}


async def test_a_look_up_that_fails_keeps_the_set() -> None:
    async with following("engines", Resolver(ONE, NO_ANSWER, NO_NAME, OSError("no network"), TWO)) as (_, told):
        await told.wait_for(lambda told: bool(told.sets) and told.sets[-1].serving == TWO)
        assert [told_set.serving for told_set in told.sets[:2]] == [ONE, TWO]
        assert told.failures == ["dns", "dns", "dns"]


async def test_a_name_without_addresses_is_empty_at_first() -> None:
    async with following("engines", Resolver(NO_NAME, ONE)) as (source, told):
        await told.wait_for(lambda told: len(told.sets) >= 2)
        assert [told_set.serving for told_set in told.sets[:2]] == [frozenset(), ONE]
        assert source.has_synced


async def test_a_resolver_that_is_away_from_the_start_never_synced() -> None:
    async with following("engines", Resolver(NO_ANSWER)) as (source, told):
        await told.wait_for(lambda told: len(told.failures) >= 3)
        assert (source.has_synced, told.sets) == (False, [])


async def test_the_systems_resolver_knows_this_machine() -> None:
    async with following("localhost", None) as (_, told):
        await told.wait_for(lambda told: bool(told.sets))
        assert told.sets[0].serving <= {"127.0.0.1:50051", "[::1]:50051"}
        assert told.sets[0].serving
