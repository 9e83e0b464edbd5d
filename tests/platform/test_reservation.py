import pytest

from rempart_platform.errors import ErrorKind
from rempart_platform.tenancy.reservation import Reservation, ReserveReply, format_duration

ASKED = Reservation("request", "acme", 5, model="m", key_id="k", money=1_500_000_000)


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


def _reply(
    outcome: str, wait_us: int, *, limit: int = 10, account: str = "tenant", unknown: bool = False
) -> ReserveReply:
    windows = (10, 12, 5_000_000, 100, 120, 5_000_000)
    return ReserveReply(outcome, wait_us, 0, 0, *windows, outcome, limit, account, has_unknown_wait=unknown)


def test_wait_is_rounded_up_so_that_nobody_comes_too_early() -> None:
    error = _reply("requests", 1_234_001).refusal(ASKED, concurrency_retry_s=1.0)
    assert error.retry_after_s == 1.235
    assert error.message == "The limit of 10 requests per minute is reached. Try again in 1.235s."


def test_wait_is_the_longer_one_when_concurrency_refuses_too() -> None:
    for wait_us, wait_s in ((200_000, 1.0), (3_000_000, 3.0)):
        error = _reply("tokens", wait_us, unknown=True).refusal(ASKED, concurrency_retry_s=1.0)
        assert error.retry_after_s == wait_s


def test_refusal_names_tenant_and_limit() -> None:
    error = _reply("tokens", 1, limit=100).refusal(ASKED, concurrency_retry_s=1.0)
    assert error.kind is ErrorKind.RATE_LIMIT_EXCEEDED
    assert error.violation is not None
    assert (error.violation.subject, error.violation.metric, error.violation.limit) == ("acme", "tokens", 100)


def test_remaining_is_never_negative() -> None:
    headers = _reply("requests", 1).headers()
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "5s"


def test_only_a_budget_is_waited_for_longer_than_clients_do() -> None:
    long_us = 7_200_000_000
    assert _reply("tokens", long_us).refusal(ASKED, concurrency_retry_s=1.0).retry_after_s == 120.0
    error = _reply("tokens_per_day", long_us, limit=500).refusal(ASKED, concurrency_retry_s=1.0)
    assert error.retry_after_s == 7200.0
    assert error.message == "The limit of 500 tokens per day is reached. Try again in 2h0m0s."


def test_refusal_names_the_model_or_the_key_whose_limit_it_is() -> None:
    for account, text, dimensions in (
        ("model", "for this model", {"model": "m"}),
        ("key", "of this key", {"key_id": "k"}),
    ):
        error = _reply("concurrent_tokens", 0, account=account).refusal(ASKED, concurrency_retry_s=1.0)
        assert error.message.startswith(f"The limit of 10 tokens at the same time {text} is reached.")
        assert error.violation is not None
        assert error.violation.dimensions == dimensions


def test_money_is_told_in_the_operators_currency() -> None:
    error = _reply("money_per_month", 1, limit=12_500_000_000).refusal(ASKED, 1.0, currency="EUR")
    assert error.message.startswith("The limit of 12.50 EUR per month is reached.")
    reply = ReserveReply(
        "impossible", 0, 0, 0, 0, 0, 0, 0, 0, 0, "money_per_day", 10**9, "tenant", has_unknown_wait=False
    )
    error = reply.refusal(ASKED, 1.0, currency="EUR")
    assert error.kind is ErrorKind.INVALID_REQUEST
    assert error.message.startswith("This request may cost 1.50 EUR, and the limit is 1.00 EUR per day.")
    assert error.retry_after_s is None
