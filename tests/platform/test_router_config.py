from pathlib import Path

import pytest

from rempart_platform.config import ConfigError, ModelSource, RouterConfig, RouterSecrets

ARGS = ("--model", "a=/models/a", "--engines", "127.0.0.1:1")
ENVIRON = {
    "REMPART_ADMIN_KEY": "sixteen letters or more",
    "REMPART_KEY_PEPPER": "sixteen letters or more, too",
    "REMPART_CACHE_SECRET": "and another sixteen",
    "REMPART_REDIS_URL": "redis://user:word@host:6379/0",
}


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
        ((*ARGS, "--pick-failures-to-leave-out", "0"), "failures_to_leave_out"),
        ((*ARGS, "--quota-cached-token-weight", "2"), "cached_token_weight"),
    ],
)
def test_a_bad_flag_is_refused_by_name(args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        RouterConfig.from_args(args)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


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
