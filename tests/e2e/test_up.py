"""`rempart up` with the real model, as its user meets it: the pasted lines, the tenants, the numbers."""

import json
import shlex
import subprocess
import sys

import httpx
import pytest

from rempart_platform.local.run import RunningPlatform
from rempart_platform.local.testing import PlatformUnderTest, scrape
from rempart_platform.local.welcome import QUESTION, curl_line, python_lines

pytestmark = pytest.mark.e2e

ENGINE_METRICS = {
    "rempart_engine_waiting",
    "rempart_engine_running",
    "rempart_engine_free_blocks",
    "rempart_engine_blocks",
    "rempart_engine_kv_usage_ratio",
    "rempart_engine_steps_total",
    "rempart_engine_generation_tokens_total",
    "rempart_engine_prompt_tokens_total",
    "rempart_engine_preemptions_total",
    "rempart_engine_prefix_cache_hit_tokens_total",
    "rempart_engine_requests_total",
    "rempart_engine_step_duration_seconds_bucket",
    "rempart_engine_time_to_first_token_seconds_bucket",
    "rempart_engine_e2e_seconds_bucket",
    "rempart_engine_info",
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
}
ROUTER_METRICS = {
    "rempart_router_requests_total",
    "rempart_router_requests_in_flight",
    "rempart_router_prompt_tokens_total",
    "rempart_router_completion_tokens_total",
    "rempart_router_cached_tokens_total",
    "rempart_router_quota_tokens_total",
    "rempart_router_quota_events_total",
    "rempart_router_queue_time_seconds_bucket",
    "rempart_router_time_to_first_token_seconds_bucket",
    "rempart_router_time_per_output_token_seconds_bucket",
    "rempart_router_request_duration_seconds_bucket",
    "rempart_router_endpoint_ready",
    "rempart_router_endpoint_in_flight_requests",
    "rempart_router_endpoint_free_kv_blocks",
}


@pytest.fixture
def running(platform: PlatformUnderTest, model_name: str) -> RunningPlatform:
    return RunningPlatform(
        model_name=model_name,
        http=platform.http,
        grpc=platform.grpc,
        metrics=platform.metrics,
        engines=tuple(platform.engines),
        engine_metrics=(),
        api_key=platform.api_key,
        admin_key=platform.admin_key,
    )


def test_the_pasted_curl_line_names_the_capital_of_france(running: RunningPlatform) -> None:
    words = shlex.split(curl_line(running))
    (url,) = [word for word in words if word.startswith("http")]
    headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
    answer = httpx.post(url, content=words[words.index("-d") + 1], headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def test_the_pasted_python_lines_do_too(running: RunningPlatform) -> None:
    command = [sys.executable, "-c", python_lines(running)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert "Paris" in ended.stdout, ended.stderr


def test_the_terminal_chat_does_too(platform: PlatformUnderTest) -> None:
    chat = platform.cli("chat", "--temperature", "0", "--max-tokens", "24", questions=f"{QUESTION}\n")
    assert "Paris" in chat.stdout, chat.stderr


def test_a_limited_tenant_is_told_the_true_wait(platform: PlatformUnderTest, model_name: str) -> None:
    def ask(key: str) -> httpx.Response:
        body = {"model": model_name, "prompt": "Hello", "max_tokens": 1}
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{platform.http}/v1/completions", json=body, headers=headers, timeout=60)

    platform.cli("tenant", "create", "limited", "--requests-per-minute", "2")
    key = json.loads(platform.cli("key", "issue", "limited", "--json").stdout)["key"]
    first, second, third = ask(key), ask(key), ask(key)
    assert [answer.status_code for answer in (first, second, third)] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(third.headers["retry-after"]) <= 60

    platform.cli("tenant", "limits", "limited", "--requests-per-minute", "0")
    assert ask(key).status_code == 200
    (record,) = json.loads(platform.cli("usage", "--tenant", "limited", "--json").stdout)["records"]
    assert (record["requests"], record["completion_tokens"]) == (3, 3)
    assert record["model"] == model_name


def test_both_processes_tell_prometheus_what_they_promise(platform: PlatformUnderTest, model_name: str) -> None:
    body = {"model": model_name, "prompt": "Hello", "max_tokens": 2}
    headers = {"authorization": f"Bearer {platform.api_key}"}
    httpx.post(f"{platform.http}/v1/completions", json=body, headers=headers, timeout=60)
    router, engine = scrape(platform.metrics), platform.engine_metrics()
    assert router.names >= ROUTER_METRICS
    assert engine.names >= ENGINE_METRICS
    assert router.total("rempart_router_endpoint_ready") == 1
    assert router.total("rempart_router_completion_tokens_total", tenant="demo") >= 2
    assert engine.total("rempart_engine_info", model_name=model_name) == 1
    assert engine.total("vllm:cache_config_info", block_size="64", model_name=model_name) == 1
