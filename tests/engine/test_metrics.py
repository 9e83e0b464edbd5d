import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rempart_engine.core.load import Counters, Load
from rempart_engine.core.request import FinishReason
from rempart_engine.ipc import Ready, StepUpdate
from rempart_engine.metrics import EngineMetrics

_COUNTERS = Counters(
    num_preemptions=3,
    num_prefix_cache_query_tokens=1000,
    num_prefix_cache_hit_tokens=640,
    num_scheduled_tokens=900,
    num_output_tokens=80,
    num_draft_tokens=50,
    num_accepted_draft_tokens=35,
    num_finished=dict.fromkeys(FinishReason, 0),
)
_LOAD = Load(
    num_waiting=2,
    num_running=5,
    num_waiting_tokens=77,
    num_free_blocks=30,
    num_blocks=40,
    num_steps=12,
    counters=_COUNTERS,
)
_MODEL = Ready("smol", "llama", 49152, 2048, (2,), 40, "bfloat16")


# What Prometheus 2.42 says that it accepts.
_ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def _scrape(metrics: EngineMetrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples of a scrape over HTTP: name -> labels -> value."""
    port = metrics.serve("127.0.0.1", 0)
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"accept": _ACCEPT})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def test_a_loading_engine_can_be_scraped() -> None:
    assert _scrape(EngineMetrics("1.0"))["rempart_engine_requests_total"][(("finish_reason", "stop"),)] == 0


def test_a_loading_engine_tells_how_far_it_is_and_what_limits_it() -> None:
    metrics = EngineMetrics("1.0", {"max_num_rows": 64})
    metrics.set_loaded(0.25)
    samples = _scrape(metrics)
    assert samples["rempart_engine_loaded_ratio"][()] == 0.25
    assert samples["rempart_engine_limit"] == {(("limit", "max_num_rows"),): 64}
    assert samples["rempart_engine_front_process_start_time_seconds"][()] > 0
    assert "rempart_engine_info" not in samples


@pytest.mark.parametrize("digest", ["", "0123456789abcdef"])
def test_a_loaded_engine_tells_what_its_files_were_compared_with(digest: str) -> None:
    metrics = EngineMetrics("1.0")
    if digest:
        metrics.set_manifest(digest)
    metrics.set_model(_MODEL)
    samples = _scrape(metrics)
    assert samples["rempart_engine_loaded_ratio"][()] == 1
    ((labels, value),) = samples["rempart_engine_info"].items()
    assert value == 1
    assert dict(labels)["manifest"] == digest


def test_what_the_core_told_last_is_what_a_scrape_shows() -> None:
    metrics = EngineMetrics("1.0")
    metrics.set_model(_MODEL)
    metrics.observe_step(StepUpdate((), _LOAD, num_tokens=9, duration_s=0.02))
    samples = _scrape(metrics)
    expected = {
        "rempart_engine_waiting": 2,
        "rempart_engine_running": 5,
        "rempart_engine_waiting_tokens": 77,
        "rempart_engine_free_blocks": 30,
        "rempart_engine_kv_usage_ratio": 0.25,
        "rempart_engine_steps_total": 12,
        "rempart_engine_generation_tokens_total": 80,
        "rempart_engine_draft_tokens_total": 50,
        "rempart_engine_accepted_draft_tokens_total": 35,
        "rempart_engine_preemptions_total": 3,
        "rempart_engine_prefix_cache_query_tokens_total": 1000,
        "rempart_engine_prefix_cache_hit_tokens_total": 640,
        "rempart_engine_step_duration_seconds_count": 1,
    }
    assert {name: samples[name][()] for name in expected} == expected


def test_the_model_server_protocol_finds_its_names() -> None:
    metrics = EngineMetrics("1.0")
    metrics.set_model(_MODEL)
    metrics.observe_step(StepUpdate((), _LOAD, num_tokens=0, duration_s=0.0))
    samples = _scrape(metrics)
    model = (("model_name", "smol"),)
    assert samples["vllm:num_requests_waiting"] == {model: 2}
    assert samples["vllm:num_requests_running"] == {model: 5}
    assert samples["vllm:kv_cache_usage_perc"] == {model: 0.25}
    shape = (("block_size", "64"), ("model_name", "smol"), ("num_gpu_blocks", "40"))
    assert samples["vllm:cache_config_info"] == {shape: 1}


def test_idle_signs_of_life_are_not_steps() -> None:
    metrics = EngineMetrics("1.0")
    metrics.observe_step(StepUpdate((), _LOAD, num_tokens=0, duration_s=0.0))
    assert _scrape(metrics)["rempart_engine_step_duration_seconds_count"][()] == 0


def test_requests_are_counted_by_reason_and_timed() -> None:
    metrics = EngineMetrics("1.0")
    metrics.observe_first_token(0.3, num_prompt_tokens=7)
    metrics.observe_choice_end(FinishReason.LENGTH)
    metrics.observe_request_end(1.5)
    samples = _scrape(metrics)
    assert samples["rempart_engine_requests_total"][(("finish_reason", "length"),)] == 1
    assert samples["rempart_engine_prompt_tokens_total"][()] == 7
    assert samples["rempart_engine_time_to_first_token_seconds_sum"][()] == 0.3
    assert samples["rempart_engine_e2e_seconds_sum"][()] == 1.5
