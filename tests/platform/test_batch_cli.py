"""`rempart batch`, as a shell calls it, over fake batch jobs."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rempart_platform.apis.batch_testing import FakeBatches, FakeFiles, batch_services, serve_batches
from rempart_platform.apis.testing import CALLER, KEY
from rempart_platform.batch.values import BatchLimits, BatchStatus, InputError
from rempart_platform.errors import ErrorKind, RempartError

LINES = [json.dumps({"custom_id": name, "url": "/v1/completions"}) + "\n" for name in ("one", "bad", "three")]
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Ended:
    returncode: int | None
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `rempart batch` against the fakes."""

    address: str
    files: FakeFiles
    batches: FakeBatches

    async def start(self, *args: str) -> asyncio.subprocess.Process:
        environ = {**os.environ, "REMPART_ADDRESS": self.address, "REMPART_API_KEY": KEY}
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "rempart_platform.cli", "batch", *args)
        return await asyncio.create_subprocess_exec(*command, env=environ, stdout=pipe, stderr=pipe)

    async def run(self, *args: str) -> Ended:
        process = await self.start(*args)
        async with asyncio.timeout(120):
            stdout, stderr = await process.communicate()
        return Ended(process.returncode, stdout.decode(), stderr.decode())

    async def ids(self, *args: str) -> list[str]:
        """Of the batches that a command shows."""
        return [batch["batch_id"] for batch in json.loads((await self.run(*args, "--json")).stdout)["batches"]]

    async def create(self) -> str:
        file_id = self.files.add(CALLER.tenant, "".join(LINES).encode()).file_id
        batch = await self.batches.create(
            CALLER, input_file_id=file_id, endpoint=CHAT, completion_window_s=3600, metadata={}
        )
        return batch.batch_id


@asynccontextmanager
async def shell(limits: BatchLimits | None = None) -> AsyncIterator[Shell]:
    files = FakeFiles()
    batches = FakeBatches(files)
    async with serve_batches(batch_services(files, batches, limits=limits)) as address:
        yield Shell(address, files, batches)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "nightly.jsonl"
    path.write_text("".join(LINES))
    return path


async def test_a_file_runs_from_upload_to_results(requests: Path) -> None:
    async with shell() as sh:
        sh.batches.works = True
        args = ("run", str(requests), "--window", "2h", "--metadata", "job=a=b", "--poll-s", "0.01")
        ended = await sh.run(*args, "--json")
        (batch,) = sh.batches.kept.values()
        again = await sh.run(*args)
        requests.with_name("nightly.errors.jsonl").unlink()
        without_bad = await sh.run(*args, "--overwrite", "--endpoint", CHAT)
    assert ended.returncode == 1, "a line was answered with an error"
    document: dict[str, Any] = json.loads(ended.stdout)
    assert (document["status"], document["completed"], document["failed"], document["total"]) == ("completed", 2, 1, 3)
    assert document["metadata"] == {"job": "a=b"}
    assert (batch.endpoint, batch.completion_window_s) == ("/v1/completions", 7200), "as the first line says"
    assert sh.files.stored[batch.input_file_id][1].decode() == "".join(LINES)
    assert sh.files.stored[batch.input_file_id][0].filename == "nightly.jsonl"
    assert requests.with_name("nightly.output.jsonl").read_text() == LINES[0] + LINES[2]
    assert requests.with_name("nightly.errors.jsonl").read_text() == LINES[1]
    assert (again.returncode, "nightly.output.jsonl exists" in again.stderr) == (2, True)
    assert without_bad.returncode == 1
    assert [each.endpoint for each in sh.batches.kept.values()] == ["/v1/completions", CHAT]
    assert sorted(os.listdir(requests.parent)) == ["nightly.errors.jsonl", "nightly.jsonl", "nightly.output.jsonl"]


async def test_every_line_answered_is_a_success(tmp_path: Path) -> None:
    (tmp_path / "in").write_text(LINES[0])
    async with shell() as sh:
        sh.batches.works = True
        output = tmp_path / "answers"
        ended = await sh.run("run", str(tmp_path / "in"), "--poll-s", "0.01", "--output", str(output))
    assert ended.returncode == 0, ended.stderr
    assert "completed" in ended.stdout
    assert ended.stderr.splitlines() == [*sh.batches.kept, str(output)]
    assert output.read_text() == LINES[0]


async def test_batches_are_shown_cancelled_and_fetched(tmp_path: Path) -> None:
    async with shell() as sh:
        ids = [await sh.create() for _ in range(2)][::-1]
        assert await sh.ids("list") == ids
        assert await sh.ids("list", "--limit", "1") == ids[:1]
        table = (await sh.run("list")).stdout
        assert [batch_id in table for batch_id in ids] == [True, True]
        cancelled = json.loads((await sh.run("cancel", ids[0], "--json")).stdout)
        assert (cancelled["status"], cancelled["completed_s"]) == ("cancelling", None)
        early = await sh.run("download", ids[0])
        assert (early.returncode, f"{ids[0]} has not ended: it is cancelling" in early.stderr) == (1, True)
        output = sh.files.add(CALLER.tenant, b"answers\n").file_id
        sh.batches.change(
            ids[0],
            status=BatchStatus.CANCELLED,
            output_file_id=output,
            errors=(InputError("invalid_json_line", "No JSON.", line=3),),
        )
        shown = await sh.run("show", ids[0])
        assert ("cancelled" in shown.stdout, "line 3: No JSON." in shown.stdout) == (True, True)
        fetched = await sh.run("download", ids[0], "--output", str(tmp_path / "out"))
    assert (fetched.returncode, fetched.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert (tmp_path / "out").read_bytes() == b"answers\n"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.jsonl"
    path.write_text("".join(LINES) * 20_000)
    return path


async def test_as_many_batches_as_may_be_asked_for_are_shown_whatever_is_wrong_with_them() -> None:
    errors = (InputError("invalid_json_line", "x" * 500, line=1),) * 100
    async with shell() as sh:
        ids = [await sh.create() for _ in range(100)][::-1]
        for batch_id in ids:
            sh.batches.change(batch_id, status=BatchStatus.FAILED, errors=errors)
        assert await sh.ids("list", "--limit", "100") == ids


async def test_a_refusal_is_one_line(requests: Path, large: Path, tmp_path: Path) -> None:
    async with shell(BatchLimits(max_file_bytes=20)) as sh:
        refused = {
            "INVALID_ARGUMENT": await sh.run("run", str(large)),
            "NOT_FOUND": await sh.run("show", "batch_gone"),
            "refuses the key": await sh.run("list", "--key", "wrong"),
            "No such file": await sh.run("run", str(tmp_path / "none.jsonl")),
        }
        label = await sh.run("run", str(requests), "--metadata", "nightly")
        same = await sh.run("run", str(requests), "--output", "x", "--errors", "x")
    for word, ended in refused.items():
        assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (1, "", 1)
        assert word in ended.stderr
    assert "max_file_bytes" in refused["INVALID_ARGUMENT"].stderr
    assert (label.returncode, "is not KEY=VALUE" in label.stderr) == (2, True)
    assert (same.returncode, "a file each" in same.stderr) == (2, True)
    assert sh.files.stored == {}


async def test_nothing_of_a_pipe_is_lost(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with shell() as sh:
        sh.batches.works = True
        async with asyncio.timeout(120):
            _, ended = await asyncio.gather(
                asyncio.to_thread(pipe.write_text, "".join(LINES)), sh.run("run", str(pipe), "--poll-s", "0.01")
            )
        (batch,) = sh.batches.kept.values()
    assert sh.files.stored[batch.input_file_id][1].decode() == "".join(LINES), ended.stderr


async def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async with shell() as sh:
        batch_id = await sh.create()
        output = sh.files.add(CALLER.tenant, b"x" * 3000).file_id
        sh.batches.change(batch_id, status=BatchStatus.COMPLETED, output_file_id=output)
        sh.files.failure, sh.files.fail_at = RempartError(ErrorKind.UNAVAILABLE, "The storage does not answer."), 2
        ended = await sh.run("download", batch_id, "--output", str(tmp_path / "out"))
        assert os.listdir(tmp_path) == []
        (tmp_path / "out.part").write_text("mine")
        taken = await sh.run("download", batch_id, "--output", str(tmp_path / "out"))
    assert (ended.returncode, "The storage does not answer" in ended.stderr) == (1, True)
    assert (taken.returncode, "out.part" in taken.stderr) == (1, True)
    assert (tmp_path / "out.part").read_text() == "mine"


async def test_ctrl_c_leaves_the_batch_and_says_how_to_fetch_it(requests: Path) -> None:
    async with shell() as sh, asyncio.timeout(120):
        process = await sh.start("run", str(requests), "--poll-s", "0.01")
        assert process.stderr is not None
        batch_id = (await process.stderr.readline()).decode().strip()
        process.send_signal(signal.SIGINT)
        _, stderr = await process.communicate()
    assert process.returncode == 130
    assert f"{batch_id} goes on" in stderr.decode()
    assert sh.batches.kept[batch_id].status is BatchStatus.VALIDATING
