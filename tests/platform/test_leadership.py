"""Leadership by a Lease: one leads, another takes over, and never both."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import pytest

from rempart_platform.cluster.leadership import LeaseConfig, OwnLeadership, parse_lease_name
from rempart_platform.cluster.lease_leadership import LeaseLeadership
from rempart_platform.cluster.testing import FakeKubernetes

# What lasts seconds is measured by the tests' own clock, but for the 2 s that a request may take.
CONFIG = LeaseConfig(lease_s=15.0, renew_s=10.0, retry_s=2.0)


async def short_pause(_: float) -> None:
    await asyncio.sleep(0.02)


@dataclass
class Candidate:
    leadership: LeaseLeadership
    running: asyncio.Task[None]
    port: int

    async def stop(self) -> None:
        self.running.cancel()
        with suppress(asyncio.CancelledError):
            await self.running


class Rig:
    """An API, candidates that reach it each by a port of their own, and one clock for all."""

    def __init__(self, api: FakeKubernetes, stack: AsyncExitStack) -> None:
        self.api = api
        self.now_s = 1000.0
        self._stack = stack
        self._ports: set[int] = set()

    async def candidate(self, identity: str) -> Candidate:
        port = await self.api.listen()
        self._ports.add(port)
        client = await self._stack.enter_async_context(self.api.client(port))
        leadership = LeaseLeadership(
            client, ("llm", "router"), identity, CONFIG, clock=lambda: self.now_s, pause=short_pause
        )
        candidate = Candidate(leadership, asyncio.create_task(leadership.run()), port)
        self._stack.push_async_callback(candidate.stop)
        return candidate

    def holder(self) -> str | None:
        holder: str | None = self.api.leases["router"]["spec"]["holderIdentity"]
        return holder

    async def wait_for_leader(self, candidate: Candidate) -> None:
        async with asyncio.timeout(30):
            while not candidate.leadership.is_leader():
                await self.api.wait_for_requests(1, candidate.port)

    async def let_all_try(self) -> None:
        """Returns when every candidate that is not cut off has tried.

        A try is up to two requests. Of the first of these four the answer may still be on its way, or it may be the
        second one of a try that had begun before.
        """
        await self.api.wait_for_requests(4, *(self._ports - self.api.faults.hangs))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(FakeKubernetes())
        yield Rig(api, stack)


async def test_the_first_one_leads_and_goes_on_leading(rig: Rig) -> None:
    one = await rig.candidate("one")
    await rig.wait_for_leader(one)
    two = await rig.candidate("two")
    for _ in range(10):
        await rig.let_all_try()
        assert (one.leadership.is_leader(), two.leadership.is_leader()) == (True, False)
        rig.now_s += 3
    assert rig.holder() == "one"


async def test_of_two_at_the_same_time_one_leads(rig: Rig) -> None:
    candidates = [await rig.candidate(name) for name in ("one", "two", "three")]
    await rig.let_all_try()
    assert [each.leadership.is_leader() for each in candidates].count(True) == 1


async def test_when_the_leader_dies_another_leads_once_the_lease_is_over(rig: Rig) -> None:
    one = await rig.candidate("one")
    await rig.wait_for_leader(one)
    two = await rig.candidate("two")
    await rig.let_all_try()
    rig.api.faults.hangs.add(one.port)  # it is killed: nothing more comes from it
    await rig.let_all_try()
    rig.now_s += 14.9
    await rig.let_all_try()
    assert not two.leadership.is_leader()
    rig.now_s += 0.2
    await rig.wait_for_leader(two)
    assert rig.holder() == "two"
    assert rig.api.leases["router"]["spec"]["leaseTransitions"] == 1


async def test_a_leader_that_is_cut_off_stops_before_the_lease_can_be_taken(rig: Rig) -> None:
    one = await rig.candidate("one")
    await rig.wait_for_leader(one)
    two = await rig.candidate("two")
    await rig.let_all_try()
    rig.api.faults.hangs.add(one.port)
    await rig.let_all_try()
    who_leads = []
    for _ in range(18):
        rig.now_s += 1
        await rig.let_all_try()
        who_leads.append((one.leadership.is_leader(), two.leadership.is_leader()))
    nobody = who_leads.index((False, False))
    assert who_leads[:nobody] == [(True, False)] * nobody
    assert nobody >= 8
    assert who_leads[nobody : nobody + 4] == [(False, False)] * 4
    assert who_leads[-1] == (False, True)
    rig.api.faults.hangs.clear()
    await rig.let_all_try()
    assert (one.leadership.is_leader(), two.leadership.is_leader()) == (False, True)
    assert not one.running.done()  # it waits for its next turn


async def test_a_leader_that_was_stopped_for_long_does_not_lead_when_it_wakes(rig: Rig) -> None:
    one = await rig.candidate("one")
    await rig.wait_for_leader(one)
    rig.now_s += 10.1  # as after SIGSTOP: no other code ran in between
    assert not one.leadership.is_leader()
    await rig.wait_for_leader(one)


async def test_one_that_stops_gives_the_lease_up_at_once(rig: Rig) -> None:
    one = await rig.candidate("one")
    await rig.wait_for_leader(one)
    two = await rig.candidate("two")
    await rig.let_all_try()
    await one.stop()
    assert not one.leadership.is_leader()
    await rig.wait_for_leader(two)  # the clock stands still


async def test_without_permission_or_api_nobody_leads_and_all_keep_trying(rig: Rig) -> None:
    rig.api.faults.forbids = True
    one = await rig.candidate("one")
    await rig.let_all_try()
    assert not one.leadership.is_leader()
    rig.api.faults.forbids = False
    await rig.wait_for_leader(one)
    await rig.api.stop()
    rig.now_s += 10.1
    assert not one.leadership.is_leader()
    await rig.api.start()
    await rig.wait_for_leader(one)


@pytest.mark.parametrize(
    "body", [b"<h1>down</h1>", b"{}", b'{"metadata": {}, "spec": {"holderIdentity": [1]}}', b"\xff"]
)
async def test_an_answer_that_is_no_lease_takes_leadership_and_nothing_else(rig: Rig, body: bytes) -> None:
    one = await rig.candidate("one")
    await rig.wait_for_leader(one)
    rig.api.faults.answer = (200, body)
    await rig.let_all_try()
    rig.now_s += 10.1
    await rig.let_all_try()
    assert not one.leadership.is_leader()
    rig.api.faults.answer = None
    await rig.wait_for_leader(one)
    rig.api.faults.answer = (200, body)
    await one.stop()


def test_alone_every_router_leads() -> None:
    assert OwnLeadership().is_leader()


def test_a_lease_is_named_by_namespace_and_name() -> None:
    assert parse_lease_name("llm/router") == ("llm", "router")
    for text in ("", "router", "/router", "llm/", "a/b/c"):
        with pytest.raises(ValueError, match="is not NAMESPACE/NAME"):
            parse_lease_name(text)


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ((15, 15, 2), "renew_s must be below lease_s"),
        ((15, 10, 10), "retry_s must be below renew_s"),
        ((15, 10, 0), "retry_s must be at least 1"),
    ],
)
def test_times_that_would_allow_two_leaders_are_refused(times: tuple[float, float, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LeaseConfig(*times)
