"""How large a request may be. Each refusal names the limit that it met."""

from dataclasses import dataclass

from rempart_platform.bounds import require_positive
from rempart_platform.errors import invalid_request

_MAY_BE_ZERO = (
    "max_tools",
    "max_tool_chars",
    "max_schema_chars",
    "max_logprobs",
    "max_stop_strings",
    "max_stop_token_ids",
    "max_logit_bias",
    "max_allowed_token_ids",
    "max_label_chars",
)
"""Where 0 refuses every use, which an operator may want."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request, the same for every front end."""

    max_prompt_chars: int = 2_000_000
    """Characters of all messages together, checked before any of them is tokenized."""
    max_messages: int = 1024
    """Of a conversation."""
    max_tools: int = 128
    """That a request may offer."""
    max_tool_chars: int = 500_000
    """Characters of all tools' names, descriptions and schemas together."""
    max_schema_chars: int = 100_000
    """Characters of the schema of a response format."""
    max_json_nodes: int = 20_000
    """Values of one JSON text within a request: a schema, a call's arguments."""
    max_json_depth: int = 64
    """How deep such a text may nest."""
    max_n: int = 16
    """Choices of a request."""
    max_logprobs: int = 20
    """Alternatives that are told for each token."""
    max_stop_strings: int = 16
    """Of a request."""
    max_stop_chars: int = 256
    """Characters of one stop string."""
    max_stop_token_ids: int = 64
    """Of a request."""
    max_logit_bias: int = 1024
    """Tokens that a request may bias."""
    max_allowed_token_ids: int = 1024
    """Of a request that allows some tokens only."""
    max_label_chars: int = 64
    """Characters of `user` and of `prompt_cache_key`."""
    default_max_tokens: int = 4096
    """Most output tokens of a request that names no number itself."""
    max_request_s: float = 3600.0
    """Longest deadline of a request; a caller's longer one is cut to it."""

    def __post_init__(self) -> None:
        require_positive(self, or_zero=_MAY_BE_ZERO)


def require_at_most(value: int, limits: RequestLimits, limit: str, param: str, *, unit: str) -> None:
    """Raises INVALID_REQUEST when `value` is above the limit of that name."""
    bound: int = getattr(limits, limit)
    if value > bound:
        message = f"'{param}' has {value} {unit}; at most {bound} are allowed (limit {limit})."
        raise invalid_request(message, param)
