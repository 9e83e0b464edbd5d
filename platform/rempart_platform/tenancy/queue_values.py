"""The values of the fair queue: what asks, what was granted, what the scripts answer, what a caller is told."""

from dataclasses import dataclass
from typing import Literal

from rempart_platform.bounds import require, require_positive
from rempart_platform.endpoints.capacity import CapacityRules
from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.generation import ServiceTier, Usage
from rempart_platform.tenancy.redis_client import ScriptReply

MAX_RETRY_AFTER_S = 120.0
"""Clients give up rather than wait longer."""


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """How requests wait for engines. All routers of one Redis must agree on it."""

    mode: Literal["fair", "off"] = "fair"
    """"off" hands every request to an engine at once."""
    order: Literal["fifo", "deadline"] = "fifo"
    """Of one tenant's requests in one class: by arrival, or by the end of their time-outs and then by arrival."""
    max_waiting: int = 10_000
    """Of one model, all tenants together."""
    max_waiting_per_tenant: int = 2000
    """Of one model."""
    output_weight: float = 2.0
    """What an output token is charged; a prompt token that is not cached is charged 1, a cached one nothing."""
    ageing_s: float = 30.0
    """A request that waits as long counts as the class above; 0 lets classes make no difference."""
    lease_s: float = 8.0
    """How long a crashed router's requests stay. Renewed every `poll_s`."""
    poll_s: float = 1.0
    """How often a router looks for what it may have missed."""
    capacity_s: float = 3.0
    """For how long what a router saw of the engines' room counts."""
    block_s: float = 0.1
    """How long one question for grants waits at Redis, and at most half of the time-out there."""
    drain_s: float = 2.0
    """For how long endings under way hold up a router that stops."""
    capacity: CapacityRules = CapacityRules()

    def __post_init__(self) -> None:
        require_positive(self, or_zero=("output_weight", "ageing_s", "block_s", "drain_s"))
        often = 2 * self.poll_s < min(self.lease_s, self.capacity_s)
        require(often, "poll_s", "less than half of lease_s and of capacity_s")

    def charge(self, usage: Usage) -> float:
        """What a request's flow is charged."""
        return usage.prompt_tokens - usage.cached_tokens + self.output_weight * usage.completion_tokens


@dataclass(frozen=True, slots=True)
class QueueRequest:
    """What asks for a place in an engine. The id holds no spaces."""

    request_id: str
    tenant: str
    model: str
    num_prompt_tokens: int
    num_output_tokens: int
    """The most, of all choices together."""
    num_rows: int = 1
    timeout_s: float = 600.0
    service_tier: ServiceTier = ServiceTier.DEFAULT
    weight: float = 1.0
    """The tenant's."""

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, slots=True)
class Place:
    """A request's place in the engines of its model, until it is released."""

    request: QueueRequest
    fence: int
    """Grows with every grant of the model."""
    waited_s: float


@dataclass(frozen=True, slots=True)
class EnqueueReply:
    """The answer of `scripts/queue_enqueue.lua`."""

    outcome: str
    fence: int
    num_ahead: int
    """Requests that are served before it, about; of a refusal, those that wait."""
    estimate_us: int
    num_swept: int

    @classmethod
    def parse(cls, reply: ScriptReply) -> "EnqueueReply":
        outcome, *numbers = reply
        return cls(str(outcome), *(int(number or 0) for number in numbers))

    def refusal(self, request: QueueRequest, config: QueueConfig) -> RempartError:
        """The error for an outcome that let nothing wait."""
        retry_after_s = min(max(self.estimate_us / 1e6, 1.0), MAX_RETRY_AFTER_S)
        if self.outcome == "tenant_full":
            limit = config.max_waiting_per_tenant
            return RempartError(
                ErrorKind.RATE_LIMIT_EXCEEDED,
                f"The limit of {limit} requests that wait for {request.model!r} is reached (max_waiting_per_tenant).",
                retry_after_s=retry_after_s,
                violation=QuotaViolation(request.tenant, "waiting", limit),
            )
        assert self.outcome == "full"
        return RempartError(
            ErrorKind.UNAVAILABLE,
            f"{config.max_waiting} requests wait for {request.model!r}, and no more may (max_waiting). Try again.",
            retry_after_s=retry_after_s,
        )


@dataclass(frozen=True, slots=True)
class ClassSnapshot:
    """One class at one moment. `lag` is the virtual time between its first and its last tenant."""

    num_waiting: int
    num_tenants: int
    lag: float


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """How the queue of a model stands, over all routers."""

    num_waiting: int
    rows: int
    """Granted."""
    tokens: int
    """The most that what is granted may come to."""
    max_rows: int
    max_tokens: int
    jain: float
    """Jain's index over tokens per weight of all tenants that were served in the last whole minute."""
    num_waiting_of_tenant: int
    is_waiting: bool
    """Of the request that was asked for."""
    num_ahead: int
    estimate_s: float
    classes: dict[ServiceTier, ClassSnapshot]

    @classmethod
    def parse(cls, reply: ScriptReply) -> "QueueSnapshot":
        numbers = [float(part or 0) for part in reply]
        waiting, rows, tokens, max_rows, max_tokens, jain, of_tenant, is_waiting, num_ahead, estimate_us = numbers[:10]
        classes = {
            service_tier: ClassSnapshot(int(numbers[start]), int(numbers[start + 1]), numbers[start + 2])
            for service_tier, start in zip(ServiceTier, range(10, len(numbers), 3), strict=True)
        }
        return cls(
            num_waiting=int(waiting),
            rows=int(rows),
            tokens=int(tokens),
            max_rows=int(max_rows),
            max_tokens=int(max_tokens),
            jain=jain,
            num_waiting_of_tenant=int(of_tenant),
            is_waiting=bool(is_waiting),
            num_ahead=int(num_ahead),
            estimate_s=estimate_us / 1e6,
            classes=classes,
        )
