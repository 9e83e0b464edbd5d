"""A tenant's cached prefixes are found by that tenant alone, whatever key it sends along.

The engine's prefix cache, sessions, router, keys and salts are real; only what computes is not.
"""

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from tests.e2e.test_two_routers import ADMIN_KEY, running_router

from rempart_engine.testing import EngineUnderTest, FakeModel
from rempart_platform.admin_client import open_admin
from rempart_platform.local_testing import write_byte_model
from rempart_platform.tenancy.embedded import EmbeddedRedisConfig, embedded_redis
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

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


@pytest.mark.parametrize("cache_key", ["", "the same for all"], ids=["no key", "one key for all"])
async def test_of_two_hundred_pairs_of_tenants_none_finds_what_the_other_left(tmp_path: Path, cache_key: str) -> None:
    draw = random.Random(1)
    fake = FakeModel(vocab_size=258, max_model_len=2 * NUM_TOKENS, num_blocks=2 * NUM_PAIRS * 40)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(embedded_redis(EmbeddedRedisConfig()))
        flags = ("--served-model-name", "fake", "--max-step-tokens", "4096")
        engine = stack.enter_context(EngineUnderTest(fake, tmp_path, *flags))
        router = await stack.enter_async_context(running_router(write_byte_model(tmp_path), engine.address, redis.url))
        admin = await stack.enter_async_context(open_admin(router.grpc, ADMIN_KEY))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(router.grpc))
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def key_of(name: str) -> str:
            await admin.create_tenant(name)
            return (await admin.issue_key(name)).key

        async def probe(number: int) -> tuple[int, int, int]:
            prefix = [draw.randrange(256) for _ in range(NUM_TOKENS)]
            mine, theirs = await key_of(f"mine-{number}"), await key_of(f"theirs-{number}")
            first = await num_cached(stub, mine, prefix, cache_key)
            other = await num_cached(stub, theirs, prefix, cache_key)
            return first, other, await num_cached(stub, mine, prefix, cache_key)

        found: list[tuple[int, int, int]] = []
        for start in range(0, NUM_PAIRS, 10):
            found += await asyncio.gather(*(probe(number) for number in range(start, start + 10)))
    assert found == [(0, 0, WHOLE_BLOCKS)] * NUM_PAIRS
