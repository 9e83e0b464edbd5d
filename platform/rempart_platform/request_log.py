"""One structured line for every request that ends: ids, counts and times, never a word of prompt or output."""

import logging

from rempart_platform.request_trace import RequestTrace

_logger = logging.getLogger(__name__)


def log_request(trace: RequestTrace) -> None:
    """Writes the line."""
    request, usage = trace.request, trace.usage
    _logger.info(
        "request ended",
        extra={
            "request_id": request.request_id,
            "tenant": request.caller.tenant,
            "key_id": request.caller.key_id,
            "model": request.model,
            "user": request.user,
            "client_request_id": request.client_request_id,
            "service_tier": request.service_tier.name.lower(),
            "outcome": trace.outcome,
            "finish_reasons": trace.finish_reasons,
            "endpoints": trace.endpoints,
            "num_choices": request.num_choices,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "queue_s": _rounded(trace.dispatched_s, trace.started_s),
            "ttft_s": _rounded(trace.first_delta_s, trace.started_s),
            "e2e_s": _rounded(trace.ended_s, trace.started_s),
        },
    )


def _rounded(end_s: float | None, start_s: float) -> float | None:
    return None if end_s is None else round(end_s - start_s, 6)
