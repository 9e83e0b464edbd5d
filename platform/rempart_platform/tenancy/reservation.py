"""The values of the ledger: what is held, what the reserve script answered, what a caller is told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.tenancy.money import format_money
from rempart_platform.tenancy.prices import FREE, ModelPrice
from rempart_platform.tenancy.redis_client import ScriptReply

MAX_WAIT_S = 120.0
"""The longest wait that is told for anything but a budget: OpenAI's clients give up on longer ones."""
_TEXTS = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "concurrency": "requests at the same time",
    "concurrent_tokens": "tokens at the same time",
    "tokens_per_day": "tokens per day",
    "tokens_per_month": "tokens per month",
    "money_per_day": "per day",
    "money_per_month": "per month",
}
_BUDGETS = ("tokens_per_day", "tokens_per_month", "money_per_day", "money_per_month")


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place held for one request, until it is settled or refunded."""

    reservation_id: str
    tenant: str
    tokens: int
    """The worst case that was reserved."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """x-ratelimit-{limit,remaining,reset}-{requests,tokens}; those of an unlimited quantity are left out."""
    model: str = ""
    """It counts in the account of this model, and in that of `key_id`; "" for none."""
    key_id: str = ""
    money: int = 0
    """The worst case that was reserved, billionths of the currency."""
    price: ModelPrice = FREE
    """What it is settled at, whatever the price is by then."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What counts in one account at one moment, budgets included. Money is in billionths of the currency."""

    requests: int
    """In the window."""
    tokens: int
    """In the window."""
    concurrency: int
    """In flight."""
    held_tokens: int
    """In flight, at their worst case."""
    held_money: int
    tokens_per_day: int
    """Settled this UTC day."""
    money_per_day: int
    tokens_per_month: int
    money_per_month: int

    @classmethod
    def parse(cls, reply: ScriptReply) -> "Balance":
        """The answer of `scripts/snapshot.lua`, which ends with the time."""
        return cls(*(int(number or 0) for number in reply[:-1]))


@dataclass(frozen=True, slots=True)
class ReserveReply:
    """The answer of `scripts/reserve.lua`; a limit of 0 is none."""

    outcome: str
    wait_us: int
    now_us: int
    num_swept_leases: int
    max_requests: int
    num_requests: int
    requests_reset_us: int
    max_tokens: int
    num_tokens: int
    tokens_reset_us: int
    limit_name: str = ""
    """What refused, as in `_TEXTS`; the tenant's plan when the outcome is "plan"."""
    limit: int = 0
    account: str = ""
    """Whose limit that is: "tenant", "model" or "key"."""
    has_unknown_wait: bool = False
    """Something in flight is in the way, and nobody knows when it ends."""
    excess: int = 0
    """Tokens beyond the limit after this grant, where the window was counted anew: 0, or the ledger is wrong."""

    @classmethod
    def parse(cls, reply: ScriptReply) -> "ReserveReply":
        (outcome, *numbers), (name, limit, account, is_unknown, excess) = reply[:10], reply[10:]
        wait, now, swept, max_requests, requests, requests_reset, max_tokens, tokens, tokens_reset = (
            int(number or 0) for number in numbers
        )
        return cls(
            *(str(outcome), wait, now, swept),
            *(max_requests, requests, requests_reset, max_tokens, tokens, tokens_reset),
            *(str(name), int(limit or 0), str(account), is_unknown == 1),
            excess=int(excess or 0),
        )

    @property
    def is_admitted(self) -> bool:
        return self.outcome == "admitted"

    def headers(self) -> dict[str, str]:
        """OpenAI's rate-limit headers: `reset` is the time until the whole limit is free again."""
        headers = {}
        for name, limit, used, reset_us in (
            ("requests", self.max_requests, self.num_requests, self.requests_reset_us),
            ("tokens", self.max_tokens, self.num_tokens, self.tokens_reset_us),
        ):
            if limit > 0:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{name}"] = format_duration(reset_us)
        return headers

    def refusal(self, asked: Reservation, concurrency_retry_s: float, currency: str = "") -> RempartError:
        """The error for a reply that did not admit.

        Args:
            asked: what was not reserved.
            concurrency_retry_s: when to try again for what is in flight, for nobody knows when it ends.
            currency: of money, for the message.
        """
        error = self._impossible(asked, currency) if self.outcome == "impossible" else None
        if error is None:
            # Rounded up to a millisecond, so that whoever waits just that long is not too early.
            wait_s = math.ceil(self.wait_us / 1000) / 1000
            if self.has_unknown_wait:
                wait_s = max(wait_s, concurrency_retry_s)
            if self.limit_name not in _BUDGETS:
                wait_s = min(wait_s, MAX_WAIT_S)
            error = RempartError(
                ErrorKind.RATE_LIMIT_EXCEEDED,
                f"The limit of {self._limit_text(currency)} is reached. "
                f"Try again in {format_duration(math.ceil(wait_s * 1e6))}.",
                retry_after_s=wait_s,
                violation=self._violation(asked),
            )
        error.headers.update(self.headers())
        return error

    def _impossible(self, asked: Reservation, currency: str) -> RempartError:
        amount = format_money(asked.money) + f" {currency}".rstrip() if self._is_money else f"{asked.tokens} tokens"
        verb = "cost" if self._is_money else "use"
        return RempartError(
            ErrorKind.INVALID_REQUEST,
            f"This request may {verb} {amount}, and the limit is {self._limit_text(currency)}. "
            "Shorten the prompt, or ask for fewer output tokens or choices.",
            violation=self._violation(asked),
        )

    @property
    def _is_money(self) -> bool:
        return self.limit_name.startswith("money")

    def _limit_text(self, currency: str) -> str:
        amount = format_money(self.limit) + f" {currency}".rstrip() if self._is_money else str(self.limit)
        whose = {"model": " for this model", "key": " of this key"}.get(self.account, "")
        return f"{amount} {_TEXTS[self.limit_name]}{whose}"

    def _violation(self, asked: Reservation) -> QuotaViolation:
        dimensions = {"model": {"model": asked.model}, "key": {"key_id": asked.key_id}}.get(self.account, {})
        return QuotaViolation(asked.tenant, self.limit_name, self.limit, dimensions)


def format_duration(duration_us: int) -> str:
    """A duration as Go prints it, rounded up to a millisecond: "0s", "12ms", "1.5s", "6m0s"."""
    milliseconds = -(-duration_us // 1000)
    if milliseconds == 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
