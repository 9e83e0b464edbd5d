"""One platform with the real model, for all tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rempart_platform.local.demo_model import DEMO_MODEL_NAME
from rempart_platform.local.testing import PlatformUnderTest


@pytest.fixture(scope="session")
def model_name() -> str:
    return DEMO_MODEL_NAME


@pytest.fixture(scope="session")
def platform(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlatformUnderTest]:
    """`rempart up` as people run it; at the end, Ctrl-C must leave nothing of it behind."""
    folder = tmp_path_factory.mktemp("up")
    (folder / "tmp").mkdir()
    environ = {**os.environ, "TMPDIR": str(folder / "tmp")}
    with PlatformUnderTest(environ=environ, log_path=folder / "up.log") as platform:
        platform.wait_until_ready()
        yield platform
        processes = platform.processes()
        assert platform.stop() == 0, platform.log_path.read_text()
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []
        assert list((folder / "tmp").iterdir()) == []
