"""bench/tenant_isolation.py: it runs, and what is wrong it does not measure."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench/ is no installed package

from bench import tenant_isolation
from bench.tenant_isolation import WrongAnswerError, run, show

from rempart_platform.endpoints.capacity import CapacityRules

pytestmark = pytest.mark.slow


async def test_it_times_a_light_tenant_alone_and_beside_a_flood() -> None:
    alone, beside = await run(num_rounds=1, num_asked=3, rules=CapacityRules())
    assert (alone.requests, beside.requests) == (3, 3)
    prefill_ms = 10 * 50  # steps of a prompt, of which the first may be under way
    assert 0.9 * prefill_ms <= alone.p50 <= alone.p99 <= alone.most
    assert "beside 320 requests of a flood" in show((alone, beside))


async def test_a_wrong_answer_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_isolation, "hash_token", lambda *_: 0)
    with pytest.raises(ExceptionGroup) as raised:
        await run(num_rounds=1, num_asked=1, rules=CapacityRules())
    assert raised.group_contains(WrongAnswerError)
