"""Discovery against a Kubernetes API that misbehaves: the set is right within seconds, whatever the watch does."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from rempart_platform.cluster.testing import FakeKubernetes, Told, endpoint
from rempart_platform.endpoints.discovery import KubernetesConfig
from rempart_platform.endpoints.kubernetes import ServiceSource
from rempart_platform.endpoints.service_name import ServiceName, parse_services
from rempart_platform.endpoints.source import MergedSource

ENGINES = ServiceName("llm", "engines")
DEFAULT = KubernetesConfig()


@asynccontextmanager
async def following(
    api: FakeKubernetes, config: KubernetesConfig = DEFAULT, *services: ServiceName
) -> AsyncIterator[Told]:
    told = Told()
    async with api.client() as client:
        sources = [ServiceSource(client, service, config, told, random.Random(1)) for service in services or (ENGINES,)]
        task = asyncio.create_task(MergedSource(sources).run(told))
        try:
            yield told
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.fixture
async def api() -> AsyncIterator[FakeKubernetes]:
    async with FakeKubernetes() as api:
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.1"), endpoint("10.0.0.2"))
        yield api


def at(*hosts: str) -> list[str]:
    return [f"{host}:50051" for host in hosts]


async def test_what_is_listed_and_what_changes_is_told(api: FakeKubernetes) -> None:
    async with following(api) as told:
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2"))
        await api.put_slice("engines-b", "engines", endpoint("10.0.1.1"))
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2", "10.0.1.1"))
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.2"))
        await told.wait_for_set(at("10.0.0.2", "10.0.1.1"))
        await api.put_slice("other-a", "other", endpoint("10.9.9.9"))
        await api.delete_slice("engines-b")
        await told.wait_for_set(at("10.0.0.2"))
        await api.put_slice("engines-a", "engines")
        await told.wait_for_set([])
        assert (api.num_lists, api.num_watches, told.failures) == (1, 1, [])


async def test_an_empty_service_is_a_set_too() -> None:
    async with FakeKubernetes() as api, following(api) as told:
        await told.wait_for_set([])


async def test_several_services_are_one_set(api: FakeKubernetes) -> None:
    await api.put_slice("small-a", "small", endpoint("10.2.0.1"), endpoint("10.0.0.1"))
    async with following(api, DEFAULT, ENGINES, ServiceName("llm", "small")) as told:
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2", "10.2.0.1"))
        await api.put_slice("small-a", "small", endpoint("10.0.0.1"))
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2"))


async def test_a_delete_that_the_watch_lost_is_found_by_the_next_list(api: FakeKubernetes) -> None:
    await api.put_slice("engines-b", "engines", endpoint("10.0.1.1"))
    async with following(api, KubernetesConfig(relist_s=1.5)) as told:
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2", "10.0.1.1"))
        await api.wait_for(lambda api: api.num_watching == 1)
        api.faults.loses_deletes = True
        await api.delete_slice("engines-b")
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2"))
        assert told.failures == []


@pytest.mark.parametrize("way", ["status", "event"])
async def test_history_that_is_gone_is_listed_anew(api: FakeKubernetes, way: str) -> None:
    api.faults.expired = way  # type: ignore[assignment]  # one of its values
    async with following(api) as told:
        await told.wait_for(lambda told: "410" in told.failures)
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.3"))
        await told.wait_for_set(at("10.0.0.3"))  # by lists alone
        api.faults.expired = ""
        await api.wait_for(lambda api: api.num_watching == 1)
        await api.delete_slice("engines-a")
        await told.wait_for_set([])
        assert set(told.failures) == {"410"}


async def test_a_connection_that_swallows_every_packet_is_given_up(api: FakeKubernetes) -> None:
    """No byte, no end, no acknowledgement: only the kernel's own question finds it. All times are the defaults."""
    async with following(api) as told:
        await api.wait_for(lambda api: api.num_watching == 1)
        await api.swallow_packets()
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.3"))
        await told.wait_for_set(at("10.0.0.3"), timeout_s=20)
        assert told.failures in (["timeout"], ["connection"])


async def test_a_server_that_is_silent_beyond_the_watch_is_given_up(api: FakeKubernetes) -> None:
    api.faults.stalls = True
    async with following(api, KubernetesConfig(watch_s=1.0, silence_s=0.5)) as told:
        await api.wait_for(lambda api: api.num_watching == 1)
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.3"))
        await told.wait_for_set(at("10.0.0.3"))
        assert set(told.failures) == {"timeout"}


@pytest.mark.parametrize("way", ["clean", "broken"])
async def test_watches_that_end_at_once_are_neither_trusted_nor_hammered(api: FakeKubernetes, way: str) -> None:
    api.faults.cuts = way  # type: ignore[assignment]  # one of its values
    config = KubernetesConfig(backoff_initial_s=0.1, backoff_max_s=0.2, relist_s=0.5)
    async with following(api, config) as told:
        await api.wait_for(lambda api: api.num_watches >= 5)
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.3"))
        await told.wait_for_set(at("10.0.0.3"))
        await api.wait_for(lambda api: api.num_lists >= 4)
        assert api.num_watches <= api.num_lists * 20  # of which each took half a second, and each watch 0.05 s


async def test_a_watch_that_breaks_misses_nothing(api: FakeKubernetes) -> None:
    async with following(api) as told:
        for number in range(5):
            await api.wait_for(lambda api: api.num_watching == 1)
            await api.cut()
            await api.put_slice("engines-a", "engines", endpoint(f"10.0.0.{number}"))
            await told.wait_for_set(at(f"10.0.0.{number}"))
        assert set(told.failures) == {"connection"}


@pytest.mark.parametrize(
    "line",
    [
        b"<html>502 Bad Gateway</html>",
        b'{"type": "ADDED"}',
        b'{"type": "ADDED", "object": {"metadata": {"name": "x"}, "endpoints": [{"addresses": []}]}}',
        b'{"type": "EXPLODED", "object": {"metadata": {}}}',
        b'{"type": "ERROR", "object": []}',
        b"\xff\xfe",
        b"x" * 5_000_000,
    ],
    ids=["html", "no object", "no address", "unknown type", "no status", "no text", "no end"],
)
async def test_nonsense_changes_nothing_and_is_followed_by_a_list(api: FakeKubernetes, line: bytes) -> None:
    api.faults.garbage = line
    async with following(api) as told:
        await told.wait_for(lambda told: "garbage" in told.failures)
        assert told.sets[-1].serving == set(at("10.0.0.1", "10.0.0.2"))
        api.faults.garbage = b""
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.3"))
        await told.wait_for_set(at("10.0.0.3"))
        assert set(told.failures) == {"garbage"}


async def test_an_error_in_no_text_is_an_error_like_any_other(api: FakeKubernetes) -> None:
    api.faults.answer = (502, b"<h1>\xff\xfe</h1>")
    async with following(api) as told:
        await told.wait_for(lambda told: told.failures == ["502", "502"])
        api.faults.answer = None
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2"))


async def test_a_refusal_is_said_once_and_clearly_and_tried_again(
    api: FakeKubernetes, caplog: pytest.LogCaptureFixture
) -> None:
    api.faults.forbids = True
    with caplog.at_level(logging.WARNING):
        async with following(api) as told:
            await told.wait_for(lambda told: len(told.failures) >= 3)
            assert (set(told.failures), told.sets) == ({"403"}, [])
            (record,) = (record for record in caplog.records if "service account needs get, list" in record.message)
            assert record.levelno == logging.ERROR
            api.faults.forbids = False
            await told.wait_for_set(at("10.0.0.1", "10.0.0.2"))


async def test_a_source_has_synced_once_every_service_was_read_and_stays_so(api: FakeKubernetes) -> None:
    api.faults.forbids = True
    told = Told()
    async with api.client() as client:
        services = (ENGINES, ServiceName("llm", "small"))
        source = MergedSource([ServiceSource(client, service, DEFAULT, told, random.Random(1)) for service in services])
        running = asyncio.create_task(source.run(told))
        await told.wait_for(lambda told: len(told.failures) >= 2)
        assert not source.has_synced
        api.faults.forbids = False
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2"))
        await told.wait_for(lambda _: source.has_synced)
        await api.stop()
        await told.wait_for(lambda told: told.failures[-1] == "connection")
        assert source.has_synced
        running.cancel()
        await asyncio.wait([running])


async def test_an_api_that_is_away_at_the_start_and_later_loses_no_endpoint(api: FakeKubernetes) -> None:
    await api.stop()
    async with following(api) as told:
        await told.wait_for(lambda told: told.failures[:1] == ["connection"])
        assert told.sets == []
        await api.start()
        await told.wait_for_set(at("10.0.0.1", "10.0.0.2"))
        await api.stop()
        await told.wait_for(lambda told: len(told.failures) >= 4)
        assert told.sets[-1].serving == set(at("10.0.0.1", "10.0.0.2"))
        await api.start()
        await api.put_slice("engines-a", "engines", endpoint("10.0.0.3"))
        await told.wait_for_set(at("10.0.0.3"))


async def test_a_thousand_endpoints_in_many_slices_and_pages(api: FakeKubernetes) -> None:
    hosts = [f"10.1.{number // 250}.{number % 250}" for number in range(1000)]
    await api.delete_slice("engines-a")
    for start in range(0, 1000, 50):
        await api.put_slice(f"engines-{start}", "engines", *(endpoint(host) for host in hosts[start : start + 50]))
    async with following(api) as told:
        await told.wait_for_set(at(*hosts))
        await api.wait_for(lambda api: api.num_watching == 1)
        for start in range(0, 1000, 100):
            await api.delete_slice(f"engines-{start}")
        await told.wait_for_set(at(*(host for start in range(50, 1000, 100) for host in hosts[start : start + 50])))


async def test_one_client_and_no_connection_is_left_after_many_watches(api: FakeKubernetes) -> None:
    async with following(api, KubernetesConfig(backoff_initial_s=0.01, backoff_max_s=0.02)) as told:
        for number in range(10):
            await api.wait_for(lambda api: api.num_watching == 1)
            await api.put_slice("engines-a", "engines", endpoint(f"10.0.0.{number}"))
            await told.wait_for_set(at(f"10.0.0.{number}"))
            await api.cut()
        await api.wait_for(lambda api: api.num_watching == 1)
    await api.wait_for(lambda api: api.num_watching == 0)


def test_services_are_parsed() -> None:
    assert parse_services("llm/engines, other/small:engine") == (
        ServiceName("llm", "engines", "grpc"),
        ServiceName("other", "small", "engine"),
    )


@pytest.mark.parametrize("text", ["", "engines", "/engines", "llm/", "llm/a/b", "llm/a:", "llm/a,llm/a"])
def test_services_that_are_malformed_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not NAMESPACE/SERVICE|is named twice"):
        parse_services(text)
