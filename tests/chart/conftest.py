"""All renderings, made once and side by side: helm waits for the disk more than for the processor."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.chart.rendering import ALL_CASES, Case, Manifest, render


@pytest.fixture(scope="session")
def renderings() -> Mapping[Case, tuple[Manifest, ...]]:
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(ALL_CASES, pool.map(render, ALL_CASES), strict=True))
