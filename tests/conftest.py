"""What every test may ask for."""

from pathlib import Path

import pytest

from rempart_platform.demo_model import find_demo_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return find_demo_model()
