"""A tenant's cached prefixes are found by that tenant alone, whatever key it sends along.

The engine's prefix cache, sessions, router, keys and salts are real; only what computes is not.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from tests.e2e.test_two_routers import ADMIN_KEY, running_router

from rempart_engine.testing import EngineUnderTest, FakeModel
from rempart_platform.console.admin_client import AdminClient, open_admin
from rempart_platform.local.testing import write_byte_model
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_platform.tenancy.terms import TERMS_S
from rempart_protos.v1 import admin_pb2, inference_pb2, inference_pb2_grpc, sampling_pb2

NUM_PAIRS = 200
NUM_TOKENS = 2000
WHOLE_BLOCKS = (NUM_TOKENS - 1) // 64 * 64

pytestmark = pytest.mark.e2e


async def num_cached(
    stub: "inference_pb2_grpc.InferenceAsyncStub", key: str, token_ids: list[int], cache_key: str
) -> int:
    """How many prompt tokens of the request came from the cache."""
    sampling = sampling_pb2.SamplingParams(max_tokens=1)
    request = inference_pb2.CompleteRequest(
        model="fake",
        token_ids=inference_pb2.TokenIds(ids=token_ids),
        options=inference_pb2.GenerationOptions(sampling=sampling, prompt_cache_key=cache_key),
    )
    call = stub.Complete(request, metadata=(("authorization", f"Bearer {key}"),))
    usages = [event.usage async for event in call if event.HasField("usage")]
    assert [usage.prompt_tokens for usage in usages] == [NUM_TOKENS]
    return usages[0].cached_tokens


@dataclass(frozen=True)
class Platform:
    """A router over an engine, for operators and for tenants."""

    admin: AdminClient
    stub: "inference_pb2_grpc.InferenceAsyncStub"

    async def key_of(self, name: str, cache_group: str | None = None) -> str:
        """The key of a new tenant."""
        await self.admin.create_tenant(name, standing=admin_pb2.Standing(cache_group=cache_group))
        return (await self.admin.issue_key(name)).key


@asynccontextmanager
async def running_platform(tmp_path: Path) -> AsyncIterator[Platform]:
    fake = FakeModel(vocab_size=258, max_model_len=2 * NUM_TOKENS, num_blocks=2 * NUM_PAIRS * 40)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        flags = ("--served-model-name", "fake", "--max-step-tokens", "4096")
        engine = stack.enter_context(EngineUnderTest(fake, tmp_path, *flags))
        router = await stack.enter_async_context(running_router(write_byte_model(tmp_path), engine.address, redis.url))
        admin = await stack.enter_async_context(open_admin(router.grpc, ADMIN_KEY))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(router.grpc))
        yield Platform(admin, inference_pb2_grpc.InferenceStub(channel))


@pytest.mark.parametrize("cache_key", ["", "the same for all"], ids=["no key", "one key for all"])
async def test_of_two_hundred_pairs_of_tenants_none_finds_what_the_other_left(tmp_path: Path, cache_key: str) -> None:
    draw = random.Random(1)
    async with running_platform(tmp_path) as platform:

        async def probe(number: int) -> tuple[int, int, int]:
            prefix = [draw.randrange(256) for _ in range(NUM_TOKENS)]
            mine, theirs = await platform.key_of(f"mine-{number}"), await platform.key_of(f"theirs-{number}")
            first = await num_cached(platform.stub, mine, prefix, cache_key)
            other = await num_cached(platform.stub, theirs, prefix, cache_key)
            return first, other, await num_cached(platform.stub, mine, prefix, cache_key)

        found: list[tuple[int, int, int]] = []
        for start in range(0, NUM_PAIRS, 10):
            found += await asyncio.gather(*(probe(number) for number in range(start, start + 10)))
    assert found == [(0, 0, WHOLE_BLOCKS)] * NUM_PAIRS


async def test_tenants_of_one_group_share_a_cache_and_no_other_finds_what_they_left(tmp_path: Path) -> None:
    prefix = [random.Random(2).randrange(256) for _ in range(NUM_TOKENS)]
    async with running_platform(tmp_path) as platform:
        first, second = await platform.key_of("first", "house"), await platform.key_of("second", "house")
        apart = await platform.key_of("third", "other-house"), await platform.key_of("house")
        assert await num_cached(platform.stub, first, prefix, "") == 0
        assert await num_cached(platform.stub, second, prefix, "") == WHOLE_BLOCKS
        assert await num_cached(platform.stub, second, prefix, "a key") == 0
        assert [await num_cached(platform.stub, key, prefix, "") for key in apart] == [0, 0]
        await platform.admin.set_standing("first", admin_pb2.Standing(), ["cache_group"])
        await asyncio.sleep(TERMS_S)  # what a change may take, and not longer
        assert await num_cached(platform.stub, first, prefix, "") == 0
