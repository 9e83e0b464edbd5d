"""Manifests: what they list, what they refuse, what a signature over one proves, and an engine that requires one."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from rempart_engine.config import EngineConfig
from rempart_engine.manifest import ManifestError, verify_manifest, write_manifest
from rempart_engine.testing import EngineUnderTest, FakeModel

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 70_000,
    "assets/a b.txt": b"",
    "assets/deep/é.md": b"x",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, contents in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return folder


@pytest.fixture
def manifest(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "manifest.json"
    assert write_manifest(model, path) == len(FILES)
    return path


def write_keys(folder: Path, name: str = "key", key: Any = None) -> tuple[Path, Path]:
    """PEM files of a private key and its public one."""
    key = key or Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_manifest_lists_every_file_with_size_and_hash(model: Path, manifest: Path) -> None:
    assert json.loads(manifest.read_bytes()) == {
        "version": 1,
        "files": {
            name: {"size": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
            for name, contents in sorted(FILES.items())
        },
    }
    assert verify_manifest(model, manifest) == len(FILES)
    assert verify_manifest(Path(os.path.relpath(model)), manifest) == len(FILES)


def test_progress_ends_at_the_whole_model(model: Path, manifest: Path) -> None:
    total = sum(map(len, FILES.values()))
    told: list[tuple[int, int]] = []
    verify_manifest(model, manifest, on_progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_manifest_may_lie_in_the_folder_and_does_not_list_itself(model: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    inside = model / "manifest.json"
    for _ in range(2):  # the second finds the first in its way
        assert write_manifest(model, inside, private) == len(FILES)
        assert verify_manifest(model, inside, public) == len(FILES)
    assert sorted(path.name for path in model.iterdir() if path.is_file()) == [
        "config.json",
        "manifest.json",
        "manifest.json.sig",
        "model.safetensors",
    ]


def test_a_model_may_be_one_file(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    manifest = tmp_path / "one.json"
    assert write_manifest(file, manifest) == verify_manifest(file, manifest) == 1
    file.write_bytes(b"v" * 70_000)
    with pytest.raises(ManifestError, match=r"model\.safetensors: has other contents"):
        verify_manifest(file, manifest)


def flip_a_bit(model: Path) -> None:
    path = model / "model.safetensors"
    contents = bytearray(path.read_bytes())
    contents[69_999] ^= 1
    path.write_bytes(contents)


def move(model: Path) -> None:
    (model / "config.json").rename(model / "assets" / "config.json")


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (flip_a_bit, r"model\.safetensors: has other contents"),
    (lambda model: (model / "config.json").write_bytes(b"{ }"), r"config\.json: has 3 bytes instead of 2"),
    (lambda model: (model / "assets" / "a b.txt").unlink(), r"assets/a b\.txt: is missing"),
    (lambda model: (model / "pytorch_model.bin").write_bytes(b""), r"pytorch_model\.bin: is not in the manifest"),
    (lambda model: (model / ".hidden").write_bytes(b""), r"\.hidden: is not in the manifest"),
    (move, r"assets/config\.json: is not in the manifest; config\.json: is missing"),
    (lambda model: shutil.rmtree(model / "assets"), r"assets/a b\.txt: is missing; assets/deep/.\.md: is missing"),
    (shutil.rmtree, "No such file"),
    (empty, "holds no file"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_whatever_differs_is_named(model: Path, manifest: Path, change: Callable[[Path], object], message: str) -> None:
    change(model)
    with pytest.raises(ManifestError, match=message):
        verify_manifest(model, manifest)


def test_many_differences_are_counted(model: Path, manifest: Path) -> None:
    for number in range(23):
        (model / f"{number}.txt").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"; and 3 more$"):
        verify_manifest(model, manifest)


def test_links_within_the_folder_are_hashed_as_what_they_lead_to(model: Path, tmp_path: Path) -> None:
    (model / "link.json").symlink_to("config.json")
    manifest = tmp_path / "links.json"
    assert write_manifest(model, manifest) == len(FILES) + 1
    (model / "link.json").unlink()
    (model / "link.json").symlink_to("model.safetensors")
    with pytest.raises(ManifestError, match=r"link\.json: has 70000 bytes instead of 2"):
        verify_manifest(model, manifest)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../outside.json", r"bad: is a link that leaves the folder"),
        ("/etc/hostname", r"bad: is a link that leaves the folder"),
        ("nowhere", "bad: .*No such file"),
        ("bad", "bad: "),
        ("assets", "bad: is not a plain file"),
    ],
)
def test_links_to_anything_else_are_refused(model: Path, manifest: Path, target: str, message: str) -> None:
    (model.parent / "outside.json").write_bytes(b"{}")
    (model / "bad").symlink_to(target)
    for refused in (write_manifest, verify_manifest):
        with pytest.raises(ManifestError, match=message):
            refused(model, manifest)


def test_what_is_no_file_is_refused_and_not_waited_for(model: Path, manifest: Path) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(ManifestError, match="pipe: is not a plain file"):
        verify_manifest(model, manifest)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"[]",
        b'{"version": 2, "files": {}}',
        b'{"version": 1}',
        b'{"version": 1, "files": {"a": {"size": -1, "sha256": "' + b"0" * 64 + b'"}}}',
        b'{"version": 1, "files": {"a": {"size": 1, "sha256": "00"}}}',
        b'{"version": 1, "files": {}, "more": 1}',
    ],
)
def test_a_malformed_manifest_is_refused(model: Path, manifest: Path, contents: bytes) -> None:
    manifest.write_bytes(contents)
    with pytest.raises(ManifestError, match=r"manifest\.json: "):
        verify_manifest(model, manifest)


def test_a_missing_manifest_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"absent\.json: .*No such file"):
        verify_manifest(model, tmp_path / "absent.json")
    with pytest.raises(ManifestError, match="cannot write"):
        write_manifest(model, tmp_path / "absent" / "manifest.json")


def test_a_signature_holds_for_the_exact_bytes_and_one_key(model: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    _, other = write_keys(tmp_path, "other")
    manifest = tmp_path / "signed.json"
    write_manifest(model, manifest, private)
    signature = tmp_path / "signed.json.sig"
    assert len(signature.read_bytes()) == 64
    assert verify_manifest(model, manifest, public) == len(FILES)
    with pytest.raises(ManifestError, match=r"signed\.json: the signature is not one by .*other\.pub\.pem"):
        verify_manifest(model, manifest, other)
    manifest.write_bytes(manifest.read_bytes() + b" ")
    assert verify_manifest(model, manifest) == len(FILES), "without a key the same facts are enough"
    with pytest.raises(ManifestError, match="the signature is not one by"):
        verify_manifest(model, manifest, public)
    for broken in (b"", signature.read_bytes()[:63], bytes(64)):
        signature.write_bytes(broken)
        with pytest.raises(ManifestError, match="the signature is not one by"):
            verify_manifest(model, manifest, public)
    signature.unlink()
    with pytest.raises(ManifestError, match=r"signed\.json\.sig"):
        verify_manifest(model, manifest, public)


def test_a_manifest_with_a_bad_signature_is_not_even_read(model: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    manifest = tmp_path / "manifest.json"
    write_manifest(model, manifest, private)
    manifest.write_bytes(b"not JSON")
    with pytest.raises(ManifestError, match="the signature is not one by"):
        verify_manifest(model, manifest, public)


def test_keys_that_cannot_be_used_are_named(model: Path, manifest: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "curve", generate_private_key(SECP256R1()))
    manifest.with_name("manifest.json.sig").write_bytes(bytes(64))
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"garbage")
    for key, message in (
        (private, "is not an ed25519 key"),
        (garbage, "is not a private key"),
        (public, "is not a priv"),
    ):
        with pytest.raises(ManifestError, match=message):
            write_manifest(model, tmp_path / "unwritten.json", key)
    assert not (tmp_path / "unwritten.json").exists()
    for key, message in ((public, "is not an ed25519 key"), (garbage, "is not a public key"), (tmp_path, "not a publ")):
        with pytest.raises(ManifestError, match=message):
            verify_manifest(model, manifest, key)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, with which operators make keys")
def test_openssl_makes_keys_and_checks_signatures(model: Path, tmp_path: Path) -> None:
    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=tmp_path, check=True, capture_output=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", "a.pem")
    openssl("pkey", "-in", "a.pem", "-pubout", "-out", "a.pub.pem")
    write_manifest(model, tmp_path / "m.json", tmp_path / "a.pem")
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", "a.pub.pem", "-rawin", "-in", "m.json", "-sigfile", "m.json.sig")
    openssl("pkeyutl", "-sign", "-inkey", "a.pem", "-rawin", "-in", "m.json", "-out", "m.json.sig")
    assert verify_manifest(model, tmp_path / "m.json", tmp_path / "a.pub.pem") == len(FILES)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rempart_engine.manifest", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_writes_signs_and_checks(model: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    manifest = tmp_path / "manifest.json"
    written = run(model, "--manifest", manifest, "--write", "--sign-with", private)
    assert (written.returncode, written.stdout) == (0, f"4 files written to {manifest}\n")
    checked = run(model, "--manifest", manifest, "--public-key", public)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "4 files are as in the manifest\n", "")
    (model / "config.json").unlink()
    refused = run(model, "--manifest", manifest)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "config.json: is missing" in refused.stderr
    assert "Traceback" not in refused.stderr
    for flags in (["--sign-with", private], ["--write", "--public-key", public]):
        assert run(model, "--manifest", manifest, *flags).returncode == 2


def test_an_engine_that_requires_a_manifest_serves_what_fits_it(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    folder = tmp_path / "engine"
    folder.mkdir()
    manifest = tmp_path / "manifest.json"
    write_manifest(FakeModel().write(folder), manifest, private)
    flags = ("--require-manifest", str(manifest), "--manifest-key", str(public))
    with EngineUnderTest(FakeModel(), folder, *flags) as engine:
        assert engine.address
        with urllib.request.urlopen(engine.metrics_url, timeout=30) as answer:
            told = answer.read().decode()
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    assert f'manifest="{digest}"' in told, "engines of one model can be compared"


@pytest.mark.parametrize("tampered", ["model", "manifest"])
def test_an_engine_that_requires_a_manifest_serves_nothing_else(tmp_path: Path, tampered: str) -> None:
    private, public = write_keys(tmp_path)
    folder = tmp_path / "engine"
    folder.mkdir()
    manifest = tmp_path / "manifest.json"
    write_manifest(FakeModel().write(folder), manifest, private)
    if tampered == "manifest":
        manifest.write_bytes(manifest.read_bytes() + b" ")
    served = FakeModel(vocab_size=500) if tampered == "model" else FakeModel()
    flags = ("--require-manifest", str(manifest), "--manifest-key", str(public))
    with EngineUnderTest(served, folder, *flags) as engine:
        assert engine.process.wait(30) == 2
        assert not engine.address
        assert not engine.loading, "nothing was loaded"
    said = engine.log_path.read_text()
    assert ("fake.json: has" if tampered == "model" else "the signature is not one by") in said


def test_a_key_without_a_manifest_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manifest_key goes with require_manifest"):
        EngineConfig(model=tmp_path, manifest_key=tmp_path / "key.pem")
