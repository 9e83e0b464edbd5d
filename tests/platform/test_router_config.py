import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from rempart_platform.apis.http_limits import HttpLimits
from rempart_platform.batch.config import BatchConfig
from rempart_platform.bounds import OutOfBoundsError
from rempart_platform.config import ConfigError, ModelSource, RouterConfig, RouterSecrets
from rempart_platform.tenancy.queue_values import QueueConfig
from rempart_platform.tenancy.quota import QuotaConfig

ARGS = ("--model", "a=/models/a", "--engines", "127.0.0.1:1")
ENVIRON = {
    "REMPART_ADMIN_KEY": "sixteen letters or more",
    "REMPART_KEY_PEPPER": "sixteen letters or more, too",
    "REMPART_CACHE_SECRET": "and another sixteen",
    "REMPART_REDIS_URL": "redis://user:word@host:6379/0",
}


def _numeric_flags(of: Any = RouterConfig, prefix: str = "--") -> Iterator[str]:
    """Of every number, at any depth."""
    for name, kind in get_type_hints(of).items():
        if is_dataclass(kind):
            yield from _numeric_flags(kind, f"{prefix}{name.replace('_', '-')}-")
        elif kind in (int, float, int | None):
            yield prefix + name.replace("_", "-")


def test_what_is_not_given_keeps_its_default() -> None:
    config = RouterConfig.from_args(ARGS)
    assert config == RouterConfig(models=(ModelSource("a", Path("/models/a")),), engines=("127.0.0.1:1",))


def test_flags_reach_values_at_any_depth() -> None:
    config = RouterConfig.from_args(
        (
            *ARGS,
            *("--model", "b=/models/b", "--http-port", "0", "--drain-timeout-s", "1.5", "--log-level", "error"),
            *("--http-max-body-bytes", "5", "--limits-max-n", "2", "--grpc-max-streams", "3"),
            *("--session-max-buffered-tokens", "4", "--quota-default-limits-concurrency", "6"),
            *("--pick-max-prefixes", "8", "--pick-left-out-s", "0.5"),
            *("--tenants-file", "tenants.toml", "--quota-default-limits-tokens-per-day", "7"),
        )
    )
    assert [model.name for model in config.models] == ["a", "b"]
    assert (config.http_port, config.drain_timeout_s, config.log_level) == (0, 1.5, "error")
    assert (config.http.max_body_bytes, config.limits.max_n, config.grpc.max_streams) == (5, 2, 3)
    assert (config.pick.max_prefixes, config.pick.left_out_s) == (8, 0.5)
    assert (config.tenants_file, config.quota.default_limits.tokens_per_day) == ("tenants.toml", 7)
    assert (config.session.max_buffered_tokens, config.quota.default_limits.concurrency) == (4, 6)


def test_a_models_chat_format_can_be_chosen() -> None:
    config = RouterConfig.from_args((*ARGS, "--model", "b=/b", "--chat-format", "b=deepseek_v32_speciale"))

    assert [model.chat_format for model in config.models] == [None, "deepseek_v32_speciale"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--model", "a=/a"), "--engines"),
        (("--engines", "h:1"), "--model"),
        ((*ARGS, "--no-such-flag", "1"), "--no-such-flag"),
        ((*ARGS, "--http-por", "1"), "--http-por"),
        ((*ARGS, "--http-port", "x"), "--http-port"),
        ((*ARGS, "--http-port", "65536"), "--http-port"),
        ((*ARGS, "--drain-timeout-s", "-1"), "--drain-timeout-s"),
        ((*ARGS, "--drain-timeout-s", "nan"), "--drain-timeout-s"),
        ((*ARGS, "--max-attempts", "0"), "--max-attempts"),
        ((*ARGS, "--log-level", "loud"), "--log-level"),
        ((*ARGS, "--model", "a=/b"), "--model a"),
        ((*ARGS, "--model", "b"), "--model"),
        (("--model", "a=/a", "--engines", "h:1,h"), "'h' is not host:port"),
        ((*ARGS, "--chat-format", "a=latin"), "'a=latin' is not NAME=FORMAT with a format of chatml"),
        ((*ARGS, "--chat-format", "chatml"), "'chatml' is not NAME=FORMAT"),
        ((*ARGS, "--chat-format", "b=chatml"), "--chat-format names b"),
        ((*ARGS, "--pick-failures-to-leave-out", "0"), "--pick-failures-to-leave-out must be at least 1"),
        ((*ARGS, "--quota-cached-token-weight", "2"), "--quota-cached-token-weight must be between 0 and 1"),
        ((*ARGS, "--audit-max-segment-records", "100001"), "--audit-max-segment-records must be at most 100000"),
    ],
)
def test_a_bad_flag_is_refused_by_name(args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        RouterConfig.from_args(args)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


ZERO_MAKES_SENSE = {
    *("--http-port", "--grpc-port", "--metrics-port", "--drain-delay-s", "--drain-timeout-s", "--max-tenant-labels"),
    *("--limits-max-tools", "--limits-max-tool-chars", "--limits-max-schema-chars", "--limits-max-logprobs"),
    *("--limits-max-stop-strings", "--limits-max-stop-token-ids", "--limits-max-logit-bias"),
    *("--limits-max-allowed-token-ids", "--limits-max-label-chars"),
    *("--http-idle-timeout-s", "--http-min-body-bytes-per-s", "--http-body-grace-s", "--http-discard-timeout-s"),
    *("--pick-max-prefixes", "--pick-max-counted-output-tokens", "--pick-left-out-s"),
    *("--discovery-kubernetes-silence-s", "--hold-without-engine-s"),
    *("--quota-cached-token-weight", "--quota-recount-s", "--quota-max-recounted", "--quota-drain-s"),
    *("--queue-output-weight", "--queue-ageing-s", "--queue-block-s", "--queue-drain-s", "--queue-capacity-reserve"),
    "--queue-capacity-lasts-s",
    *("--batch-drain-s", "--batch-keep-parts-s", "--batch-record-lifetime-s", "--batch-limits-file-lifetime-s"),
    *("--audit-retention-days", "--audit-close-timeout-s", "--oidc-leeway-s", "--oidc-memory-s"),
}


@pytest.mark.parametrize("flag", [*_numeric_flags()])
def test_nothing_is_0_that_makes_no_sense(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    if flag in ZERO_MAKES_SENSE or flag.startswith("--quota-default-limits-"):  # 0 is unlimited there
        RouterConfig.from_args((*ARGS, flag, "0"))
        return
    with pytest.raises(SystemExit):
        RouterConfig.from_args((*ARGS, flag, "0"))
    assert re.search(rf"{flag} must be (at least 1|above 0)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("make", "name"),
    [(BatchConfig, "drain_s"), (QuotaConfig, "recount_s"), (QueueConfig, "block_s"), (HttpLimits, "body_grace_s")],
)
def test_nothing_is_below_0_even_where_0_makes_sense(make: Callable[..., object], name: str) -> None:
    with pytest.raises(OutOfBoundsError, match=f"^{name} must be at least 0$"):
        make(**{name: -1.0})


def test_help_explains_every_flag_and_names_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        RouterConfig.from_args(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    texts = dict(re.findall(r"^  (--\S+)(.*(?:\n {24}.*)*)", shown, re.MULTILINE))
    assert set(_numeric_flags()) <= set(texts)
    assert [flag for flag, text in texts.items() if re.fullmatch(r" \S+\s+\(default: .*\)", text)] == []
    assert all(name in shown for name in ENVIRON)


def test_a_refusal_is_no_wall_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        RouterConfig.from_args((*ARGS, "--http-port", "x"))
    assert len(capsys.readouterr().err.splitlines()) < 6


def test_money_is_written_as_everywhere() -> None:
    config = RouterConfig.from_args((*ARGS, "--quota-default-limits-money-per-month", "2.50"))
    assert config.quota.default_limits.money_per_month == 2_500_000_000


@pytest.mark.parametrize("name", ENVIRON)
def test_a_missing_or_weak_secret_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        RouterSecrets.from_environ({key: value for key, value in ENVIRON.items() if key != name})
    with pytest.raises(ConfigError, match=name):
        RouterSecrets.from_environ(ENVIRON | {name: "short"})


def test_secrets_are_not_shown() -> None:
    secrets = RouterSecrets.from_environ(ENVIRON)
    assert secrets.redis_url == ENVIRON["REMPART_REDIS_URL"]
    assert not any(value in repr(secrets) for value in ENVIRON.values())
