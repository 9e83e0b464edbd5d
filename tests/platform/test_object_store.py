"""A folder and a bucket behave alike."""

from pathlib import Path

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError
from tests.buckets import Bucket

from rempart_platform.object_store import ObjectStoreUrlError, open_object_store


@pytest.fixture(params=["folder", "bucket"])
def url_and_environ(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    if request.param == "folder":
        return f"file://{tmp_path}/new", {}
    bucket: Bucket = request.getfixturevalue("bucket")
    return f"{bucket.url}/a/prefix", bucket.environ


async def test_what_is_put_is_listed_and_got_and_is_not_overwritten(
    url_and_environ: tuple[str, dict[str, str]],
) -> None:
    store = open_object_store(*url_and_environ)
    await obstore.put_async(store, "x/one", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        await obstore.put_async(store, "x/one", b"second", mode="create")
    got = await obstore.get_async(store, "x/one")
    assert bytes(await got.bytes_async()) == b"first"
    assert [each["path"] for each in await obstore.list(store, "x").collect_async()] == ["x/one"]
    with pytest.raises(FileNotFoundError):
        await obstore.get_async(store, "x/two")


@pytest.mark.parametrize("url", ["", "file://", "file:///", "file://host/path", "s3://", "http://x/y", "/var/lib"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ObjectStoreUrlError, match="neither file"):
        open_object_store(url)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ObjectStoreUrlError, match="cannot be made"):
        open_object_store(f"file://{tmp_path}/file/below")
