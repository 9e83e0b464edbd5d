"""A model from object storage: whole and as its manifest says, or not at all."""

import shutil
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from obstore.store import LocalStore
from tests.buckets import Bucket

from rempart_engine.fetch import FetchError, fetch_model, main
from rempart_engine.manifest import ManifestError, verify_manifest, write_manifest

FILES = {"config.json": b"{}", "a.safetensors": b"a" * 100_000, "sub/b.safetensors": b"b" * 70_000}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as a source holds it."""
    folder = tmp_path / "published"
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_manifest(folder, folder / "manifest.json")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "node" / "model"


def fetch(published: Path, folder: Path, **options: object) -> bool:
    return fetch_model(LocalStore(published), folder, **options)  # type: ignore[arg-type]


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_a_model_comes_whole_and_is_what_its_manifest_says(published: Path, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    assert fetch(published, folder, on_progress=lambda done, total: told.append((done, total)))
    assert verify_manifest(folder, folder / "manifest.json") == len(FILES)
    total = sum(map(len, FILES.values()))
    assert told[-1] == (total, total)
    assert beside(folder) == ["model", "model.lock"]


def test_a_second_fetch_brings_nothing(published: Path, folder: Path) -> None:
    fetch(published, folder)
    (published / "a.safetensors").unlink()
    assert not fetch(published, folder)
    assert beside(folder) == ["model", "model.lock"]


def test_a_new_version_replaces_the_old_as_a_whole(published: Path, folder: Path) -> None:
    fetch(published, folder)
    (published / "sub" / "b.safetensors").unlink()
    (published / "config.json").write_bytes(b'{"new": 1}')
    write_manifest(published, published / "manifest.json")
    assert fetch(published, folder)
    assert verify_manifest(folder, folder / "manifest.json") == 2
    assert beside(folder) == ["model", "model.lock"]


@pytest.mark.parametrize("content", [b"x" * 100_000, b"short", b"l" * 200_000])
def test_other_contents_are_refused_and_the_folder_stays_as_it_was(
    published: Path, folder: Path, content: bytes
) -> None:
    (published / "a.safetensors").write_bytes(content)
    with pytest.raises(FetchError, match=r"a\.safetensors: what the source holds is not what the manifest says"):
        fetch(published, folder)
    assert not folder.exists()


def test_a_fetch_that_was_cut_off_goes_on_with_what_is_missing(published: Path, folder: Path) -> None:
    lost = published / "sub" / "b.safetensors"
    lost.rename(published / "hidden")
    with pytest.raises(FetchError, match=r"sub/b\.safetensors"):
        fetch(published, folder, num_files_at_once=1)
    (published / "hidden").rename(lost)
    (published / "a.safetensors").unlink()  # the largest came first; it is not asked for again
    assert fetch(published, folder)
    assert (folder / "a.safetensors").read_bytes() == FILES["a.safetensors"]


def test_what_was_left_damaged_is_brought_again(published: Path, folder: Path) -> None:
    unfinished = folder.with_name("model.unfinished")
    unfinished.mkdir(parents=True)
    (unfinished / "a.safetensors").write_bytes(b"y" * 100_000)
    (unfinished / "of-another-version").write_bytes(b"")
    assert fetch(published, folder)
    assert verify_manifest(folder, folder / "manifest.json") == len(FILES)


def test_files_can_be_left_out(published: Path, folder: Path) -> None:
    assert fetch(published, folder, excluded=["*.safetensors"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json"]
    assert not fetch(published, folder, excluded=["*.safetensors"])
    assert fetch(published, folder)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "manifest.json", "./a"])
def test_a_manifest_cannot_reach_out_of_the_folder(published: Path, folder: Path, name: str) -> None:
    text = (published / "manifest.json").read_text().replace("config.json", name)
    (published / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match="no path below"):
        fetch(published, folder)


def test_the_manifest_must_be_signed_when_there_is_a_key(published: Path, folder: Path, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ManifestError, match=r"manifest\.json\.sig"):
        fetch(published, folder, public_key=public)
    write_manifest(published, published / "manifest.json", private)
    assert fetch(published, folder, public_key=public)
    assert verify_manifest(folder, folder / "manifest.json", public) == len(FILES)


def test_a_disk_that_is_too_small_is_told_before_anything_comes(
    published: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(published)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FetchError, match="1,000 bytes free"):
        fetch(published, folder)


def test_two_at_the_same_time_take_turns(published: Path, folder: Path) -> None:
    were_new: list[bool] = []
    threads = [threading.Thread(target=lambda: were_new.append(fetch(published, folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(were_new) == [False, False, False, True]


@pytest.fixture
def published_url(published: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same in a bucket, which commands can reach."""
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    for path in published.rglob("*"):
        if path.is_file():
            bucket.upload(path, f"small/{path.relative_to(published)}")
    return f"{bucket.url}/small"


def test_the_command_brings_a_model_from_a_bucket(
    published_url: str, bucket: Bucket, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([published_url, str(folder)]) == 0
    assert main([published_url, str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder} holds the model of {published_url}",
        f"{folder} already holds the model of {published_url}",
    ]
    assert main([f"{bucket.url}/other", str(folder)]) == 1
    assert "the source's manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["ftp://x/y", str(folder)])
