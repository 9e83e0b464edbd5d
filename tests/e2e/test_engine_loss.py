"""`kill -9` of the engine core in mid-stream: clients get a clean retriable error, and the engine ends at once."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import grpc
import openai
import psutil
import pytest

from rempart_platform.local.testing import PlatformUnderTest
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

pytestmark = pytest.mark.e2e

PROMPT = "Once upon a time"
MAX_TOKENS = 2000
ENGINE_END_S = 20.0
"""It takes a second or two. Whatever else it might wait for lasts longer than this."""


async def lose_over_http(platform: PlatformUnderTest, model: str, on_text: Callable[[], None]) -> openai.APIError:
    """The error that ends the stream."""
    url = f"{platform.http}/v1"
    try:
        async with openai.AsyncOpenAI(base_url=url, api_key=platform.api_key, max_retries=0, timeout=60) as client:
            stream = await client.completions.create(
                model=model, prompt=PROMPT, max_tokens=MAX_TOKENS, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                on_text()
    except openai.APIError as error:
        return error
    raise AssertionError("the stream ended well")


async def lose_over_grpc(platform: PlatformUnderTest, model: str, on_text: Callable[[], None]) -> grpc.aio.AioRpcError:
    """The error that ends the stream."""
    params = sampling_pb2.SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    options = inference_pb2.GenerationOptions(sampling=params)
    request = inference_pb2.CompleteRequest(model=model, text=PROMPT, options=options)
    metadata = (("authorization", f"Bearer {platform.api_key}"),)
    try:
        async with grpc.aio.insecure_channel(platform.grpc) as channel:
            async for event in inference_pb2_grpc.InferenceStub(channel).Complete(request, metadata=metadata):
                if event.delta.text:
                    on_text()
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


async def test_a_killed_engine_core_is_a_clean_error_and_the_end_of_its_engine(
    smollm2: Path, model_name: str, tmp_path: Path
) -> None:
    with PlatformUnderTest(environ=os.environ, log_path=tmp_path / "up.log") as platform:
        platform.wait_until_ready()
        core, engine = platform.process_of("rempart_engine.core_process"), platform.process_of("rempart_engine --")
        processes = platform.processes()
        runs = [asyncio.Event(), asyncio.Event()]
        async with asyncio.TaskGroup() as tasks:
            over_http = tasks.create_task(lose_over_http(platform, model_name, runs[0].set))
            over_grpc = tasks.create_task(lose_over_grpc(platform, model_name, runs[1].set))
            async with asyncio.timeout(60):
                for run in runs:
                    await run.wait()
            core.kill()
            _, alive = await asyncio.to_thread(psutil.wait_procs, [engine], ENGINE_END_S)
            assert alive == []
        assert over_grpc.result().code() is grpc.StatusCode.UNAVAILABLE
        assert over_http.result().code == "service_unavailable"

        # `rempart up` has nothing left to serve with: it says so, and ends.
        assert platform.process.wait(30) == 1
        assert "engine 1 ended with code 1" in platform.log_path.read_text()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
