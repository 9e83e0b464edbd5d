"""What `rempart up` says when it is ready: to a program one line of JSON, to a person what to paste."""

import json
from collections.abc import Mapping

from rempart_platform.local.run import RunningPlatform

QUESTION = "What is the capital of France?"
_MAX_TOKENS = 32


def ready_line(platform: RunningPlatform) -> str:
    """One JSON object."""
    return json.dumps(
        {
            "http": platform.http,
            "grpc": platform.grpc,
            "metrics": platform.metrics,
            "engines": platform.engines,
            "api_key": platform.api_key,
            "admin_key": platform.admin_key,
        }
    )


def welcome(platform: RunningPlatform, program: str) -> str:
    """Addresses, keys, and one question in four languages; `program` is how this shell calls `rempart`."""
    engines = [
        f"  engine {number}     {address}, metrics on {metrics}"
        for number, (address, metrics) in enumerate(zip(platform.engines, platform.engine_metrics, strict=True), 1)
    ]
    return "\n".join(
        (
            f"Rempart serves {platform.model_name}.",
            "",
            f"  OpenAI API   {platform.http}/v1",
            f"  gRPC         {platform.grpc}",
            f"  metrics      {platform.metrics}",
            *engines,
            f"  API key      {platform.api_key}",
            f"  admin key    {platform.admin_key}",
            "",
            "Ask it, with curl:",
            "",
            curl_line(platform),
            "",
            "with grpcurl:",
            "",
            grpcurl_line(platform),
            "",
            "in Python:",
            "",
            python_lines(platform),
            "",
            "in a terminal:",
            "",
            f"REMPART_ADDRESS={platform.grpc} REMPART_API_KEY={platform.api_key} {program} chat --temperature 0",
            "",
            "and to manage tenants, keys and limits:",
            "",
            f"REMPART_ADDRESS={platform.grpc} REMPART_ADMIN_KEY={platform.admin_key} {program} tenant list",
            "",
            "Ctrl-C drains and ends it; nothing is left behind.",
        )
    )


def curl_line(platform: RunningPlatform) -> str:
    """The question through the OpenAI API, for a shell."""
    body = {"model": platform.model_name, "messages": _messages(), "temperature": 0, "max_tokens": _MAX_TOKENS}
    return (
        f"curl -s {platform.http}/v1/chat/completions -H 'authorization: Bearer {platform.api_key}' "
        f"-H 'content-type: application/json' -d {_quoted(body)}"
    )


def grpcurl_line(platform: RunningPlatform) -> str:
    """The question through gRPC, for a shell; reflection tells grpcurl the rest."""
    body = {
        "model": platform.model_name,
        "messages": _messages(),
        "options": {"sampling": {"temperature": 0, "max_tokens": _MAX_TOKENS}},
    }
    return (
        f"grpcurl -plaintext -H 'authorization: Bearer {platform.api_key}' -d {_quoted(body)} "
        f"{platform.grpc} rempart.v1.Inference/Chat"
    )


def python_lines(platform: RunningPlatform) -> str:
    """The question through the `openai` client, for a Python prompt or file."""
    return "\n".join(
        (
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{platform.http}/v1", api_key="{platform.api_key}")',
            f'question = {{"role": "user", "content": "{QUESTION}"}}',
            f"answer = client.chat.completions.create(model={platform.model_name!r}, messages=[question], "
            f"temperature=0, max_tokens={_MAX_TOKENS})",
            "print(answer.choices[0].message.content)",
        )
    )


def _messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION}]


def _quoted(body: Mapping[str, object]) -> str:
    """JSON as one word of a POSIX shell."""
    return "'" + json.dumps(body).replace("'", "'\\''") + "'"
