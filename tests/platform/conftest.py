"""What tests of the platform may ask for."""

from pathlib import Path

import pytest
from tests.buckets import Bucket


@pytest.fixture(params=["folder", "bucket"])
def audit_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where an audit log is to be kept."""
    if request.param == "folder":
        return f"file://{tmp_path}/audit"
    bucket: Bucket = request.getfixturevalue("bucket")
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    return f"{bucket.url}/audit"
