"""`rempart up` as a test runs it: a process, its addresses, its numbers, and what it leaves behind.

As a module, a fake engine that takes a real one's flags: `rempart up --engine-module rempart_platform.local.testing`.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import tokenizers
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import decoders, models, pre_tokenizers

from rempart_platform.endpoints.testing import FakeEngine, Faults, fake_model_info
from rempart_platform.text.byte_level import BYTE_OF
from rempart_protos.v1 import engine_pb2

FAKE_ENGINE = "rempart_platform.local.testing"
FAKE_OUTPUT = b"round and "
"""What the fake engine says, again and again; one token is one byte."""
_STOP_S = 60.0
_CLI = (sys.executable, "-m", "rempart_platform.cli")


@dataclass(frozen=True, slots=True)
class Samples:
    """One scrape of one process."""

    values: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.values}

    def total(self, name: str, **labels: str) -> float:
        """Sum over all series of that name with at least these labels."""
        return sum(
            value for (each, its), value in self.values.items() if each == name and labels.items() <= dict(its).items()
        )


def scrape(url: str) -> Samples:
    """What a process tells Prometheus now."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return Samples(
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )


def run_cli(*args: str, environ: Mapping[str, str], questions: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs `rempart` to its end."""
    return subprocess.run(
        [*_CLI, *args], env=environ, input=questions, capture_output=True, text=True, timeout=120, check=False
    )


class PlatformUnderTest:
    """`rempart up --json` on free ports. A context manager that ends it, if need be by force.

    Args:
        args: further flags.
        environ: its environment.
        log_path: gets its stderr.
    """

    def __init__(self, *args: str, environ: Mapping[str, str], log_path: Path) -> None:
        self.environ = dict(environ)
        self.log_path = log_path
        ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
        with log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*_CLI, "up", "--json", *ports, *args], env=self.environ, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.http = self.grpc = self.metrics = self.api_key = self.admin_key = ""
        self.engines: list[str] = []

    def wait_until_ready(self) -> dict[str, object]:
        """What the ready line says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it is not ready: {self.log_path.read_text()}"
        said: dict[str, object] = json.loads(line)
        self.http, self.grpc, self.metrics = str(said["http"]), str(said["grpc"]), str(said["metrics"])
        self.api_key, self.admin_key = str(said["api_key"]), str(said["admin_key"])
        assert isinstance(said["engines"], list)
        self.engines = [str(address) for address in said["engines"]]
        self.environ |= {
            "REMPART_ADDRESS": self.grpc,
            "REMPART_ADMIN_KEY": self.admin_key,
            "REMPART_API_KEY": self.api_key,
        }
        return said

    def cli(self, *args: str, questions: str = "") -> "subprocess.CompletedProcess[str]":
        """Runs `rempart` against this platform, to its end."""
        return run_cli(*args, environ=self.environ, questions=questions)

    def processes(self) -> list[psutil.Process]:
        """This one and all below it."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def process_of(self, *words: str) -> psutil.Process:
        """The process below this one whose command line has all these words in it."""
        (found,) = [each for each in self.processes()[1:] if all(word in " ".join(each.cmdline()) for word in words)]
        return found

    def redis_socket(self) -> Path:
        """The socket of the embedded Redis, which names it in its title."""
        title = " ".join(self.process_of("unixsocket:").cmdline())
        return Path(title.partition("unixsocket:")[2].strip())

    def engine_metrics(self) -> Samples:
        """Of the only engine."""
        return scrape(self.engine_metrics_url())

    def engine_metrics_url(self) -> str:
        """Of the only engine, whose port is found by looking."""
        (address,) = self.engines
        engine = self.process_of("rempart_engine --")
        ports = {each.laddr.port for each in engine.net_connections() if each.status == psutil.CONN_LISTEN}
        (port,) = ports - {int(address.rpartition(":")[2])}
        return f"http://127.0.0.1:{port}/metrics"

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = 60.0) -> int:
        """Signals it, and waits; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def __enter__(self) -> "PlatformUnderTest":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # all below die with it
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def write_byte_model(folder: Path) -> Path:
    """The text side of a model whose token ids are bytes, with ChatML's two marks."""
    backend = tokenizers.Tokenizer(models.BPE({character: byte for character, byte in BYTE_OF.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{m.role}}{{m.content}}<|im_end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}))
    return folder


def main(args: Sequence[str]) -> None:
    """A fake engine of the byte model, until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--hang-at", type=int, help="send nothing of an answer from this token on")
    known, _ = parser.parse_known_args(args)
    asyncio.run(_serve(known.served_model_name, Faults(hang_at=known.hang_at)))


async def _serve(model_name: str, faults: Faults) -> None:
    def token(request: engine_pb2.GenerateRequest, choice: int, index: int) -> int:
        return FAKE_OUTPUT[index % len(FAKE_OUTPUT)]

    info = fake_model_info(model_name, vocab_size=258, max_model_len=2048, eos_token_ids=(257,))
    async with FakeEngine(info, token=token, faults=faults) as engine:
        for said in ({"loading": 0.5}, {"loading": 1.0}, {"ready": True, "address": engine.address}):
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
