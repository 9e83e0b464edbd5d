"""`rempart up` as a process, over fake engines: how it starts, how it ends, and what it leaves behind."""

import codecs
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from rempart_platform.local.child_process import ChildDeath
from rempart_platform.local.config import (
    LocalConfig,
    LocalConfigError,
    engine_command,
    served_name,
    threads_per_engine,
    to_engine_flag,
    verify_command,
)
from rempart_platform.local.startup_view import StartupView
from rempart_platform.local.testing import FAKE_ENGINE, PlatformUnderTest, run_cli, write_byte_model
from rempart_platform.local.up import ExitCode
from rempart_platform.local.up import up as run_up

Up = Callable[..., PlatformUnderTest]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def own_tmp() -> Iterator[Path]:
    """An empty folder with a short path: that of a Unix socket in it has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="up") as folder:
        yield Path(folder)


@pytest.fixture
def up(model_folder: Path, tmp_path: Path, own_tmp: Path) -> Up:
    """Starts `rempart up` with a temp folder of its own."""

    def start(*args: str, engine_module: str = FAKE_ENGINE) -> PlatformUnderTest:
        environ = {**os.environ, "TMPDIR": str(own_tmp), "PYTHONPATH": str(tmp_path)}
        return PlatformUnderTest(
            *("--model", str(model_folder), "--served-model-name", "smol", "--engine-module", engine_module, *args),
            environ=environ,
            log_path=tmp_path / "up.log",
        )

    return start


def assert_nothing_is_left(processes: list[psutil.Process], own_tmp: Path) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
    assert list(own_tmp.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_serves_and_a_signal_ends_it_in_order(up: Up, own_tmp: Path, number: signal.Signals) -> None:
    with up("--engines", "2") as platform:
        said = platform.wait_until_ready()
        assert said.keys() == {"http", "grpc", "metrics", "engines", "api_key", "admin_key"}
        assert len(platform.engines) == 2
        body = {"model": "smol", "prompt": "hello", "max_tokens": 5}
        headers = {"authorization": f"Bearer {platform.api_key}"}
        answer = httpx.post(f"{platform.http}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.json()["choices"][0]["text"] == "round"
        processes = platform.processes()
        assert platform.stop(number) == 0
        assert platform.process.stdout is not None
        assert platform.process.stdout.read() == "", "one line is all there is on stdout"
    assert_nothing_is_left(processes, own_tmp)
    assert "Draining" in platform.log_path.read_text()


def test_it_begins_with_the_tenants_of_a_file_and_their_keys(up: Up, tmp_path: Path, own_tmp: Path) -> None:
    key = f"rk_{1:016x}_{2:064x}"
    (tmp_path / "secret").write_text(key)
    file = tmp_path / "tenants.toml"
    file.write_text(
        f"""
        [plans.gold]
        max_tier = "priority"
        [tenants.demo]
        weight = 2
        [tenants.acme]
        plan = "gold"
        [tenants.acme.keys.ci]
        from_file = "{tmp_path}/secret"
        """
    )
    with up("--tenants-file", str(file)) as platform:
        platform.wait_until_ready()
        body = {"model": "smol", "prompt": "hello", "max_tokens": 5, "service_tier": "priority"}
        for each, used in ((key, "priority"), (platform.api_key, "default")):
            headers = {"authorization": f"Bearer {each}"}
            answer = httpx.post(f"{platform.http}/v1/completions", json=body, headers=headers, timeout=60).json()
            assert (answer["choices"][0]["text"], answer["service_tier"]) == ("round", used)


def test_it_keeps_an_audit_log(up: Up, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/audit"
    with up("--audit-store", url) as platform:
        platform.wait_until_ready()
        assert platform.stop() == 0
    verified = json.loads(run_cli("audit", "verify", url, "--json", environ=os.environ).stdout)
    assert (verified["chains"], verified["problems"]) == (1, [])
    shown = run_cli("audit", "show", url, "--kind", "end", environ=os.environ).stdout
    assert len(shown.splitlines()) == 1, "the router ended in order"


def test_an_audit_log_that_cannot_be_is_named_before_anything_starts(up: Up, own_tmp: Path) -> None:
    with up("--audit-store", "audit") as platform:
        assert platform.process.wait(60) == 2
    assert "--audit-store: 'audit' is neither file:///FOLDER" in platform.log_path.read_text()
    assert list(own_tmp.iterdir()) == []


def test_a_signal_while_it_starts_ends_it_too(up: Up, tmp_path: Path, own_tmp: Path) -> None:
    started = tmp_path / "started"
    (tmp_path / "slow_engine.py").write_text(
        f"import pathlib, signal; pathlib.Path({str(started)!r}).touch(); signal.pause()"
    )
    with up(engine_module="slow_engine") as platform:
        wait_for(started.exists)
        processes = platform.processes()
        assert platform.stop() == 0
    assert_nothing_is_left(processes, own_tmp)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Looks until it holds."""
    ticker = threading.Event()
    for _ in range(round(timeout_s / 0.02)):
        if condition():
            return
        ticker.wait(0.02)
    raise TimeoutError


@pytest.mark.parametrize(
    ("words", "name"),
    [((FAKE_ENGINE, "--served-model-name"), "engine 1"), (("-m rempart_platform ",), "router")],
)
def test_a_child_that_dies_ends_everything_and_is_named(
    up: Up, own_tmp: Path, words: tuple[str, ...], name: str
) -> None:
    with up() as platform:
        platform.wait_until_ready()
        processes = platform.processes()
        (victim,) = [each for each in processes[1:] if all(word in " ".join(each.cmdline()) for word in words)]
        victim.kill()
        assert platform.process.wait(60) == 1
    assert_nothing_is_left(processes, own_tmp)
    assert f"{name} was killed by signal 9" in platform.log_path.read_text()


def test_a_redis_that_dies_ends_everything_and_is_named(up: Up, own_tmp: Path) -> None:
    with up() as platform:
        platform.wait_until_ready()
        processes = platform.processes()
        platform.process_of("unixsocket:").kill()
        assert platform.process.wait(60) == 1
    assert_nothing_is_left(processes, own_tmp)
    assert "the Redis server ended with -9" in platform.log_path.read_text()


def test_an_answer_that_nobody_reads_ends_everything_in_order(up: Up, own_tmp: Path, tmp_path: Path) -> None:
    (tmp_path / "polite_engine.py").write_text(
        "import os, runpy, signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b'it was asked to end'), os._exit(0)))\n"
        f"runpy.run_module('{FAKE_ENGINE}', run_name='__main__')\n"
    )
    with up(engine_module="polite_engine") as platform:
        assert platform.process.stdout is not None
        platform.process.stdout.close()
        assert platform.process.wait(60) == 1
    assert_nothing_is_left([], own_tmp)
    assert platform.log_path.read_text().splitlines() == [
        "engine 1 | it was asked to end",
        "rempart up: [Errno 32] Broken pipe",
    ]


def test_a_router_that_makes_no_tenant_ends_everything_and_is_heard(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rempart_platform.local.run.DEMO_TENANT", "No Name")
    config = LocalConfig(model_folder, "smol", http_port=0, grpc_port=0, metrics_port=0, engine_module=FAKE_ENGINE)
    assert run_up(config, os.environ, "rempart", as_json=True) is ExitCode.FAILED
    assert psutil.Process().children(recursive=True) == []
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("rempart up: INVALID_ARGUMENT: ")


def test_an_engine_that_cannot_start_is_reported_with_the_end_of_its_log(up: Up, tmp_path: Path) -> None:
    (tmp_path / "broken_engine.py").write_text("import sys; sys.exit('no such weights')")
    with up(engine_module="broken_engine") as platform:
        assert platform.process.wait(60) == 1
        log = platform.log_path.read_text()
    assert "engine 1 ended with code 1" in log
    assert "no such weights" in log.partition("engine 1 ended")[2]


def write_manifest(model: Path, manifest: Path) -> Path:
    written = run_cli("verify", str(model), "--manifest", str(manifest), "--write", environ=os.environ)
    assert written.returncode == 0, written.stderr
    return manifest


def test_a_model_that_is_as_its_manifest_says_is_served(
    up: Up, model_folder: Path, tmp_path: Path, own_tmp: Path
) -> None:
    manifest = write_manifest(model_folder, tmp_path / "manifest.json")
    with up("--require-manifest", str(manifest)) as platform:
        platform.wait_until_ready()
        processes = platform.processes()
        assert platform.stop() == 0
    assert_nothing_is_left(processes, own_tmp)
    assert "verify | 2 files are as in the manifest" in platform.log_path.read_text()


def test_a_tokenizer_that_was_changed_is_named_before_anything_is_started(up: Up, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = write_byte_model(tmp_path / "model")
    manifest = write_manifest(model, tmp_path / "manifest.json")
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_end|>", "<|im_enc|>"))
    started = tmp_path / "started"
    (tmp_path / "told_engine.py").write_text(f"import pathlib; pathlib.Path({str(started)!r}).touch()")
    with up("--model", str(model), "--require-manifest", str(manifest), engine_module="told_engine") as platform:
        assert platform.process.wait(60) == 1
        assert platform.process.stdout is not None
        assert platform.process.stdout.read() == ""
    log = platform.log_path.read_text()
    assert "verify ended with code 1" in log
    assert "tokenizer.json: has other contents" in log
    assert not started.exists()


def test_a_signal_while_the_model_is_verified_ends_it(
    up: Up, model_folder: Path, tmp_path: Path, own_tmp: Path
) -> None:
    os.mkfifo(tmp_path / "manifest.json")  # opening it waits for a writer, and none comes
    with up("--require-manifest", str(tmp_path / "manifest.json")) as platform:
        wait_for(lambda: any("rempart_engine.manifest" in each.cmdline() for each in platform.processes()))
        processes = platform.processes()
        assert platform.stop() == 0
    assert_nothing_is_left(processes, own_tmp)


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is a Linux feature")
def test_all_processes_die_with_it_even_when_it_is_killed(up: Up) -> None:
    with up("--engines", "2") as platform:
        platform.wait_until_ready()
        processes = platform.processes()
        assert len(processes) == 5, "itself, Redis, two engines, a router"
        platform.process.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_a_second_signal_ends_an_answer_that_is_running(up: Up, own_tmp: Path) -> None:
    with up("--engine-flag", "hang-at=5") as platform:
        platform.wait_until_ready()
        processes = platform.processes()
        body = {"model": "smol", "prompt": "hello", "max_tokens": 2000, "stream": True}
        headers = {"authorization": f"Bearer {platform.api_key}"}
        with httpx.stream("POST", f"{platform.http}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            platform.process.send_signal(signal.SIGINT)
            wait_for(lambda: "Draining" in platform.log_path.read_text())
            assert platform.stop() == 130
    assert_nothing_is_left(processes, own_tmp)


def test_the_welcome_on_a_narrow_terminal_can_be_pasted(model_folder: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 80))
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [sys.executable, "-m", "rempart_platform.cli", "up", *ports, "--engine-module", FAKE_ENGINE]
    command += ["--model", str(model_folder), "--served-model-name", "smol"]
    shown, decoder = "", codecs.getincrementaldecoder("utf-8")()  # a read may end within a character
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        while "Ctrl-C drains" not in shown:
            shown += decoder.decode(os.read(ours, 65536))
        process.send_signal(signal.SIGINT)
        while "Draining" not in shown:
            shown += decoder.decode(os.read(ours, 65536))
        assert process.wait(60) == 0
    os.close(ours)
    assert "engine 1: starting" in shown, "a terminal shows how far it is"
    (curl,) = [line for line in shown.splitlines() if line.startswith("curl ")]
    words = shlex.split(curl)
    assert json.loads(words[words.index("-d") + 1])["model"] == "smol"


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_port_that_is_taken_is_named_before_anything_starts(model_folder: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = {"--http-port": "0", "--grpc-port": "0", "--metrics-port": "0", flag: port}
        args = [part for pair in flags.items() for part in pair]
        ended = run_cli("up", "--model", str(model_folder), *args, environ=os.environ)
    assert ended.returncode == 2
    assert f"{flag} {port}" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Path("/no/such/model")}, "--model"),
        ({"model_name": "a=b"}, "--served-model-name"),
        ({"tenants_file": Path("none.toml")}, "--tenants-file: there is no none.toml"),
        ({"num_engines": 0}, "--engines"),
        ({"http_port": 8001}, "--http-port"),
        ({"manifest_key": Path("key.pem")}, "--require-manifest"),
    ],
)
def test_a_setting_that_cannot_be_served_is_named(model_folder: Path, changes: dict[str, object], message: str) -> None:
    settings = {"model": model_folder, "model_name": "smol", **changes}
    with pytest.raises(LocalConfigError, match=message):
        LocalConfig(**settings)  # type: ignore[arg-type]  # the cases name its fields


def test_ports_picked_freely_need_not_differ(model_folder: Path) -> None:
    config = LocalConfig(model_folder, "smol", http_port=0, grpc_port=0, metrics_port=0)
    assert set(config.ports.values()) == {0}


@pytest.mark.parametrize(("num_cores", "num_engines", "share"), [(2, 1, 2), (8, 3, 2), (2, 4, 1)])
def test_engines_share_the_cores(num_cores: int, num_engines: int, share: int) -> None:
    assert threads_per_engine(num_cores, num_engines) == share


def test_engine_flags_are_passed_on(model_folder: Path) -> None:
    config = LocalConfig(model_folder, "smol", num_threads=3, engine_args=("--dtype", "float32"))
    command = engine_command(config, 2, {})
    assert command.name == "engine 2"
    assert command.args[-2:] == ("--dtype", "float32")
    assert command.args[command.args.index("--num-threads") + 1] == "3"


def test_a_manifest_is_handed_to_the_engines_and_checked_before(model_folder: Path) -> None:
    assert verify_command(LocalConfig(model_folder, "smol"), {}) is None
    config = LocalConfig(model_folder, "smol", require_manifest=Path("m.json"), manifest_key=Path("key.pem"))
    engine, verify = engine_command(config, 1, {}), verify_command(config, {})
    assert engine.args[-4:] == ("--require-manifest", "m.json", "--manifest-key", "key.pem")
    assert verify is not None
    assert verify.args == (str(model_folder), "--manifest", "m.json", "--public-key", "key.pem")


@pytest.mark.parametrize(
    ("said", "flag"),
    [
        ("kv-cache-dtype=fp8", "--kv-cache-dtype=fp8"),
        ("no-enable-prefix-cache", "--no-enable-prefix-cache"),
        ("--watermark=0.5", "--watermark=0.5"),
    ],
)
def test_any_flag_of_an_engine_can_be_given(said: str, flag: str) -> None:
    assert to_engine_flag(said) == flag


@pytest.mark.parametrize("said", ["port=1", "--model=other", "require-manifest=other.json"])
def test_what_up_decides_itself_is_no_engine_flag_to_give(model_folder: Path, said: str) -> None:
    ended = run_cli("up", "--model", str(model_folder), "--engine-flag", said, environ=os.environ)
    assert ended.returncode == 2
    assert f"--engine-flag {said}: rempart up decides" in ended.stderr


def test_a_model_is_named_after_its_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "Some-Model.Q8_0.gguf").touch()
    (tmp_path / "model-1.5").mkdir()
    assert served_name(tmp_path / "Some-Model.Q8_0.gguf") == "Some-Model.Q8_0"
    assert served_name(tmp_path / "model-1.5") == "model-1.5"


def test_a_death_tells_signal_or_code_and_the_end_of_the_log() -> None:
    assert (
        str(ChildDeath("router", -9, ("a", "b"))) == "router was killed by signal 9; the last lines of its log:\na\nb"
    )
    assert str(ChildDeath("router", 2, ())).startswith("router ended with code 2")


def test_the_view_shows_bars_on_a_terminal_and_logs_everywhere(tmp_path: Path) -> None:
    for is_terminal in (True, False):
        path = tmp_path / f"{is_terminal}.txt"
        with path.open("w") as file:
            view = StartupView(Console(file=file, force_terminal=is_terminal, width=100))
            with view:
                view.expect("engine 1")
                view.loading("engine 1", 0.25)
                view.log("engine 1", "[red]not markup[/red]")
                view.ready("engine 1")
                view.ready("router")
        shown = path.read_text()
        assert "engine 1 | " in shown
        assert "[red]not markup[/red]" in shown
        assert ("engine 1: starting" in shown) == is_terminal
