"""A list of a model's files with sizes and SHA-256, checked before anything in them is parsed.

    python -m rempart_engine.manifest MODEL --manifest M --write --sign-with private.pem
    python -m rempart_engine.manifest MODEL --manifest M --public-key public.pem

A manifest is JSON, {"version": 1, "files": {"config.json": {"size": 1234, "sha256": "..."}}}. Its signature, ed25519
over the manifest's exact bytes, lies beside it in `M.sig` and is checked before the manifest itself is read.

What this proves, and what not: at the time of hashing, the folder held these files with these contents and no others.
Files are opened again to be loaded. Who can write to the folder between the two can still change what is loaded, so
serve from storage that nobody can write to meanwhile: a read-only mount or an image. Without a public key, whoever can
change the model can change its manifest too, unless that is kept elsewhere.
"""

import argparse
import hashlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from tqdm import tqdm

from rempart_engine.byte_progress import ByteProgress, OnProgress
from rempart_engine.signature import SignatureError, require_signature, sign

_SIGNATURE_SUFFIX = ".sig"
_NUM_THREADS = min(4, os.cpu_count() or 1)
"""Files hashed at a time. One core hashes 1 to 2 GB a second, often less than the storage reads."""
_MAX_PROBLEMS_IN_MESSAGE = 20


class ManifestError(ValueError):
    """A model is not what its manifest says, or there is no manifest to trust. Names every file that differs."""


class FileFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be."""

    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every file of a model, by its path below the model's folder, with "/" between its parts."""

    version: Literal[1]
    files: dict[str, FileFacts]


def write_manifest(
    model: Path, manifest: Path, private_key: Path | None = None, on_progress: OnProgress | None = None
) -> int:
    """Hash a model and write its manifest, signed if there is a key; the number of files.

    Raises:
        ManifestError: there is no such model, it has a file that no manifest can vouch for, or the key cannot be used.
    """
    found = _files(model, manifest)
    hashes = _hashes(found, on_progress)
    facts = {name: FileFacts(found[name].stat().st_size, hashes[name]) for name in sorted(found)}
    encoded = msgspec.json.format(msgspec.json.encode(Manifest(1, facts)), indent=1) + b"\n"
    if private_key is not None:
        try:
            _write(signature_path(manifest), sign(encoded, private_key))
        except SignatureError as error:
            raise ManifestError(str(error)) from error
    _write(manifest, encoded)
    return len(facts)


def verify_manifest(
    model: Path, manifest: Path, public_key: Path | None = None, on_progress: OnProgress | None = None
) -> int:
    """Hash a model and compare it with its manifest; the number of files.

    Raises:
        ManifestError: the signature is not the key's, or a file is missing, changed, or not in the manifest.
    """
    expected = read_manifest(manifest, public_key).files
    found = _files(model, manifest)
    sizes = {name: found[name].stat().st_size for name in expected.keys() & found.keys()}
    problems = [f"{name}: is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name}: is not in the manifest" for name in found.keys() - expected.keys()]
    problems += [
        f"{name}: has {size} bytes instead of {expected[name].size}"
        for name, size in sizes.items()
        if size != expected[name].size
    ]
    if not problems:  # else hashing, which takes long, could only add to it
        hashes = _hashes(found, on_progress)
        problems = [f"{name}: has other contents" for name, facts in expected.items() if hashes[name] != facts.sha256]
    if problems:
        shown = "; ".join(sorted(problems)[:_MAX_PROBLEMS_IN_MESSAGE])
        more = len(problems) - _MAX_PROBLEMS_IN_MESSAGE
        raise ManifestError(
            f"{model} is not what {manifest} says: {shown}" + (f"; and {more} more" if more > 0 else "")
        )
    return len(expected)


def read_manifest(manifest: Path, public_key: Path | None) -> Manifest:
    """What a manifest says; if there is a key, its signature is checked before.

    Raises:
        ManifestError: it cannot be read, is malformed, or the signature is not the key's.
    """
    try:
        encoded = manifest.read_bytes()
        if public_key is not None:
            require_signature(encoded, signature_path(manifest).read_bytes(), public_key)
        return msgspec.json.decode(encoded, type=Manifest)
    except (OSError, SignatureError, msgspec.DecodeError) as error:
        raise ManifestError(f"{manifest}: {error}") from error


def _files(model: Path, manifest: Path) -> dict[str, Path]:
    """Every file of the model by its name in a manifest; the manifest and its signature themselves are left out."""
    own = {manifest.resolve(), signature_path(manifest).resolve()}
    try:
        if model.is_file():
            return {model.name: model}
        root = model.resolve(strict=True)
        paths = {path.relative_to(root).as_posix(): path for path in _walk(root) if path not in own}
    except OSError as error:
        raise ManifestError(f"{model}: {error}") from error
    if not paths:
        raise ManifestError(f"{model}: holds no file")
    for name, path in paths.items():
        _require_plain(name, path, root)
    return paths


def _walk(root: Path) -> Iterator[Path]:
    """Everything below a folder that is not itself a folder; links to folders count as files."""
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _require_plain(name: str, path: Path, root: Path) -> None:
    """A link may lead to a file of the same folder, whose contents are vouched for; to anything else it may not."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # the latter for a link to itself
        raise ManifestError(f"{name}: {error}") from error
    if not target.is_relative_to(root):
        raise ManifestError(f"{name}: is a link that leaves the folder")
    if not stat.S_ISREG(target.stat().st_mode):
        raise ManifestError(f"{name}: is not a plain file")


class _Counted(io.RawIOBase):
    """A file that tells of every piece that is read."""

    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        self._file = path.open("rb", buffering=0)
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # all that hashlib passes
        num_bytes = self._file.readinto(buffer)
        self._on_read(num_bytes)
        return num_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


def _hashes(files: Mapping[str, Path], on_progress: OnProgress | None) -> dict[str, str]:
    total = sum(path.stat().st_size for path in files.values())
    progress = ByteProgress(total, on_progress)

    def digest(path: Path) -> str:
        try:
            with _Counted(path, progress.add) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # no need of getbuffer
        except OSError as error:
            raise ManifestError(f"{path}: {error}") from error

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(files, pool.map(digest, files.values()), strict=True))


def signature_path(manifest: Path) -> Path:
    """Where the signature of a manifest lies."""
    return manifest.with_name(manifest.name + _SIGNATURE_SUFFIX)


def _write(path: Path, contents: bytes) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(contents)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ManifestError(f"cannot write {path}: {error}") from error


def main(args: Sequence[str]) -> int:
    """Exit code 0: the model is what its manifest says, or the manifest is written; 1: it is not; 2: bad flags."""
    parser = argparse.ArgumentParser(
        prog="rempart verify", description="Check a model's files against a manifest.", allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="folder, or one file")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON list of the files with sizes and SHA-256")
    parser.add_argument("--write", action="store_true", help="write the manifest instead of checking it")
    parser.add_argument("--public-key", type=Path, help="PEM file; require an ed25519 signature of it in MANIFEST.sig")
    parser.add_argument("--sign-with", type=Path, help="PEM file; with --write, sign the manifest into MANIFEST.sig")
    given = parser.parse_args(args)
    if given.sign_with is not None and not given.write:
        parser.error("--sign-with goes with --write")
    if given.public_key is not None and given.write:
        parser.error("--public-key does not go with --write")
    try:
        with tqdm(desc="hashing", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            if given.write:
                num_files = write_manifest(given.model, given.manifest, given.sign_with, show)
            else:
                num_files = verify_manifest(given.model, given.manifest, given.public_key, show)
    except ManifestError as error:
        sys.stderr.write(f"rempart verify: {error}\n")
        return 1
    done = (
        f"{num_files} files written to {given.manifest}" if given.write else f"{num_files} files are as in the manifest"
    )
    sys.stdout.write(f"{done}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
