import pytest

from rempart_platform.errors import ErrorKind
from rempart_platform.tenancy.reservation import ReserveReply, format_duration


@pytest.mark.parametrize(
    ("duration_us", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (12_000, "12ms"),
        (999_000, "999ms"),
        (999_001, "1s"),
        (1_000_000, "1s"),
        (1_500_000, "1.5s"),
        (59_999_000, "59.999s"),
        (60_000_000, "1m0s"),
        (360_000_000, "6m0s"),
        (61_020_000, "1m1.02s"),
        (3_600_000_000, "1h0m0s"),
        (3_725_000_000, "1h2m5s"),
    ],
)
def test_duration_reads_as_go_prints_it(duration_us: int, text: str) -> None:
    assert format_duration(duration_us) == text


def _reply(outcome: str, wait_us: int, *, max_concurrency: int = 0, num_leases: int = 0) -> ReserveReply:
    return ReserveReply(outcome, wait_us, 0, 0, 10, 12, 100, 120, max_concurrency, num_leases, 5_000_000)


def test_wait_is_rounded_up_so_that_nobody_comes_too_early() -> None:
    error = _reply("requests", 1_234_001).refusal("acme", 5, concurrency_retry_s=1.0)
    assert error.retry_after_s == 1.235
    assert error.message == "The limit of 10 requests per minute is reached. Try again in 1.235s."


def test_wait_is_the_longer_one_when_concurrency_refuses_too() -> None:
    full = {"max_concurrency": 2, "num_leases": 2}
    assert _reply("tokens", 200_000, **full).refusal("acme", 5, concurrency_retry_s=1.0).retry_after_s == 1.0
    assert _reply("tokens", 3_000_000, **full).refusal("acme", 5, concurrency_retry_s=1.0).retry_after_s == 3.0


def test_refusal_names_tenant_and_limit() -> None:
    error = _reply("tokens", 1).refusal("acme", 5, concurrency_retry_s=1.0)
    assert error.kind is ErrorKind.RATE_LIMIT_EXCEEDED
    assert error.violation is not None
    assert (error.violation.subject, error.violation.metric, error.violation.limit) == ("acme", "tokens", 100)


def test_remaining_is_never_negative() -> None:
    headers = _reply("requests", 1).headers()
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "5s"
