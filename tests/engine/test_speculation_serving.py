"""Drafts over a real engine process with a fake model: the same stream in fewer events, and what the metrics tell."""

import asyncio
import json
import urllib.request
from pathlib import Path

import grpc
import pytest

from rempart_engine.testing import EngineUnderTest, FakeModel, fake_output
from rempart_protos.v1 import engine_pb2, engine_pb2_grpc, sampling_pb2

PROMPT = [1, 2, 3]


async def served(engine: EngineUnderTest) -> list[engine_pb2.TokenEvent]:
    sampling = sampling_pb2.SamplingParams(max_tokens=60, seed=5, logprobs=1)
    request = engine_pb2.GenerateRequest(request_id="g", prompt_token_ids=PROMPT, sampling=sampling)
    async with grpc.aio.insecure_channel(engine.address) as channel:
        return [event async for event in engine_pb2_grpc.EngineStub(channel).Generate(request)]


def scrape(engine: EngineUnderTest) -> dict[str, float]:
    with urllib.request.urlopen(engine.metrics_url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@pytest.mark.parametrize(("flags", "most"), [((), 2), (("--num-speculative-tokens", "3"), 4)])
async def test_a_model_that_drafts_streams_the_same_tokens_in_fewer_steps(
    tmp_path: Path, flags: tuple[str, ...], most: int
) -> None:
    with EngineUnderTest(FakeModel(num_mtp_layers=1), tmp_path, *flags) as engine:
        events = await served(engine)
        metrics = await asyncio.to_thread(scrape, engine)
    assert [token_id for event in events for token_id in event.token_ids] == fake_output(PROMPT, 60, seed=5)
    assert max(len(event.token_ids) for event in events) == most
    assert all(len(event.logprobs) == len(event.token_ids) for event in events)
    accepted = metrics["rempart_engine_accepted_draft_tokens_total"]
    assert accepted == 60 - len(events)
    assert accepted <= metrics["rempart_engine_draft_tokens_total"] <= len(events) * (most - 1)


async def test_drafts_can_be_switched_off(tmp_path: Path) -> None:
    with EngineUnderTest(FakeModel(num_mtp_layers=1), tmp_path, "--num-speculative-tokens", "0") as engine:
        assert len(await served(engine)) == 60
        assert (await asyncio.to_thread(scrape, engine))["rempart_engine_draft_tokens_total"] == 0


def test_drafts_asked_of_a_model_without_mtp_layers_are_refused(tmp_path: Path) -> None:
    with EngineUnderTest(FakeModel(), tmp_path, "--num-speculative-tokens", "1") as engine:
        assert engine.process.wait(30) == 2
    errors = [line for line in map(json.loads, engine.log_path.read_text().splitlines()) if line["level"] == "error"]
    assert ["num_speculative_tokens is 1, but the model has no MTP layer" in line["message"] for line in errors] == [
        True
    ]
