"""The values of the ledger: what is held, what the reserve script answered, what a caller is told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.tenancy.redis_client import ScriptReply


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place held for one request, until it is settled or refunded."""

    reservation_id: str
    tenant: str
    tokens: int
    """The worst case that was reserved."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """x-ratelimit-{limit,remaining,reset}-{requests,tokens}; those of an unlimited quantity are left out."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What counts for a tenant at one moment."""

    requests: int
    """In the window."""
    tokens: int
    """In the window."""
    concurrency: int
    """In flight."""


@dataclass(frozen=True, slots=True)
class ReserveReply:
    """The answer of `scripts/reserve.lua`; a limit of 0 is none."""

    outcome: str
    wait_us: int
    now_us: int
    num_swept_leases: int
    max_requests: int
    num_requests: int
    max_tokens: int
    num_tokens: int
    max_concurrency: int
    num_leases: int
    reset_us: int

    @classmethod
    def parse(cls, reply: ScriptReply) -> "ReserveReply":
        outcome, *numbers = reply
        return cls(str(outcome), *(int(number or 0) for number in numbers))

    @property
    def is_admitted(self) -> bool:
        return self.outcome == "admitted"

    def headers(self) -> dict[str, str]:
        """OpenAI's rate-limit headers: `reset` is the time until the whole limit is free again."""
        reset = format_duration(self.reset_us)
        headers = {}
        for name, limit, used in (
            ("requests", self.max_requests, self.num_requests),
            ("tokens", self.max_tokens, self.num_tokens),
        ):
            if limit > 0:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{name}"] = reset
        return headers

    def refusal(self, tenant: str, tokens: int, concurrency_retry_s: float) -> RempartError:
        """The error for a reply that did not admit.

        Args:
            tokens: what was asked for.
            concurrency_retry_s: when to try again for a place in flight, for nobody knows when one is freed.
        """
        if self.outcome == "impossible":
            error = RempartError(
                ErrorKind.INVALID_REQUEST,
                f"This request may use {tokens} tokens, and the limit is {self.max_tokens} tokens per minute. "
                "Shorten the prompt, or ask for fewer output tokens or choices.",
                violation=QuotaViolation(tenant, "tokens", self.max_tokens),
            )
            error.headers.update(self.headers())
            return error
        limit, text = {
            "requests": (self.max_requests, "requests per minute"),
            "tokens": (self.max_tokens, "tokens per minute"),
            "concurrency": (self.max_concurrency, "requests at the same time"),
        }[self.outcome]
        # Rounded up to a millisecond, so that whoever waits just that long is not too early.
        wait_s = math.ceil(self.wait_us / 1000) / 1000
        if 0 < self.max_concurrency <= self.num_leases:
            wait_s = max(wait_s, concurrency_retry_s)
        error = RempartError(
            ErrorKind.RATE_LIMIT_EXCEEDED,
            f"The limit of {limit} {text} is reached. Try again in {format_duration(math.ceil(wait_s * 1e6))}.",
            retry_after_s=wait_s,
            violation=QuotaViolation(tenant, self.outcome, limit),
        )
        error.headers.update(self.headers())
        return error


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
