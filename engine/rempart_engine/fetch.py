"""Bring a model from object storage to a folder: whole and as its manifest says, or not at all.

    rempart fetch s3://models/deepseek-v3.2 /weights/deepseek-v3.2 --public-key public.pem

    manifest ─► files, several at a time, hashed as they come ─► FOLDER.unfinished ─► renamed to FOLDER

What is there already is not brought again: neither a whole model, which takes milliseconds to see, nor single files of
one that was cut off. Several processes that fetch to one folder take turns. `file:///FOLDER` is a source too; that of
S3 is told by AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url
from tqdm import tqdm

from rempart_engine.byte_progress import ByteProgress, OnProgress
from rempart_engine.manifest import FileFacts, ManifestError, read_manifest, signature_path

MANIFEST = "manifest.json"
"""Where a source keeps its manifest, and a fetched model its own."""
_PIECE_BYTES = 8 * 1024 * 1024
_SPARE_BYTES = 64 * 1024 * 1024
"""Of the disk, not to be filled to its last byte."""
_FROM_STORE = (BaseError, OSError)
"""What a store raises."""


class FetchError(ValueError):
    """The model could not be brought; says which file and why."""


def fetch_model(
    source: ObjectStore,
    folder: Path,
    *,
    public_key: Path | None = None,
    excluded: Sequence[str] = (),
    num_files_at_once: int = 4,
    on_progress: OnProgress | None = None,
) -> bool:
    """Makes the folder hold the model; False when it did already.

    Args:
        source: holds `manifest.json`, its signature if there is a key, and the files.
        folder: where to; what else it held is replaced as a whole.
        public_key: PEM file of the ed25519 key that must have signed the manifest.
        excluded: patterns of files to leave out, such as "*.safetensors".
        num_files_at_once: files that are brought at a time.
        on_progress: told of the bytes that are there.

    Raises:
        FetchError: the source does not answer or lacks a file, a file is not as the manifest says, or the disk is too
            small.
        ManifestError: there is no manifest that can be trusted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    with _locked(folder.with_name(folder.name + ".lock")):
        unfinished.mkdir(exist_ok=True)
        files = _wanted(source, unfinished, public_key, excluded)
        if _holds(folder, unfinished / MANIFEST, files):
            shutil.rmtree(unfinished)
            return False
        _remove_others(unfinished, files)
        _require_room(unfinished, files)
        _bring_all(source, unfinished, files, num_files_at_once, on_progress)
        _replace(folder, unfinished)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _wanted(
    source: ObjectStore, unfinished: Path, public_key: Path | None, excluded: Sequence[str]
) -> dict[str, FileFacts]:
    """The files to bring, by name; their manifest is then in the folder."""
    manifest = unfinished / MANIFEST
    names = [manifest.name] + ([signature_path(manifest).name] if public_key is not None else [])
    for name in names:
        try:
            (unfinished / name).write_bytes(obstore.get(source, name).bytes())
        except _FROM_STORE as error:
            raise ManifestError(f"the source's {name}: {_first_line(error)}") from error
    files = read_manifest(manifest, public_key).files
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or str(parts) != name or name in names:
            raise ManifestError(f"the manifest names {name!r}, which is no path below a model's folder")
    return {name: facts for name, facts in files.items() if not any(fnmatch(name, each) for each in excluded)}


def _holds(folder: Path, manifest: Path, files: Mapping[str, FileFacts]) -> bool:
    """By manifest and sizes; contents were hashed when they came, and an engine may verify them again."""
    try:
        is_same = (folder / MANIFEST).read_bytes() == manifest.read_bytes()
        return is_same and all((folder / name).stat().st_size == facts.size for name, facts in files.items())
    except OSError:
        return False


def _remove_others(unfinished: Path, files: Mapping[str, FileFacts]) -> None:
    """What a fetch of another version left behind."""
    kept = {*files, MANIFEST, signature_path(Path(MANIFEST)).name}
    for path in unfinished.rglob("*"):
        if not path.is_dir() and path.relative_to(unfinished).as_posix() not in kept:
            path.unlink()


def _require_room(unfinished: Path, files: Mapping[str, FileFacts]) -> None:
    there = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    needed = sum(facts.size for facts in files.values()) - there + _SPARE_BYTES
    free = shutil.disk_usage(unfinished).free
    if needed > free:
        raise FetchError(f"{unfinished.parent} has {free:,} bytes free, and {needed:,} are needed")


def _bring_all(
    source: ObjectStore,
    unfinished: Path,
    files: Mapping[str, FileFacts],
    num_files_at_once: int,
    on_progress: OnProgress | None,
) -> None:
    progress = ByteProgress(sum(facts.size for facts in files.values()), on_progress)
    stop = threading.Event()

    def bring(name: str) -> None:
        try:
            if not stop.is_set():
                _bring(source, unfinished / name, name, files[name], progress, stop)
        except BaseException:
            stop.set()  # one that failed fails all: nobody waits for hours to hear of it
            raise

    with ThreadPoolExecutor(num_files_at_once) as pool:
        # The largest first, so that none is left alone at the end.
        for _ in pool.map(bring, sorted(files, key=lambda name: -files[name].size)):
            pass


def _bring(
    source: ObjectStore, path: Path, name: str, facts: FileFacts, progress: ByteProgress, stop: threading.Event
) -> None:
    if _is_there(path, facts):
        progress.add(facts.size)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with part.open("wb") as file:
            for piece in obstore.get(source, name).stream(min_chunk_size=_PIECE_BYTES):
                num_bytes += len(piece)
                if num_bytes > facts.size or stop.is_set():
                    break
                digest.update(piece)
                file.write(piece)
                progress.add(len(piece))
            file.flush()
            os.fsync(file.fileno())
    except _FROM_STORE as error:
        raise FetchError(f"{name}: {_first_line(error)}") from error
    if stop.is_set():
        return
    if num_bytes != facts.size or digest.hexdigest() != facts.sha256:
        part.unlink()
        raise FetchError(f"{name}: what the source holds is not what the manifest says")
    part.rename(path)


def _is_there(path: Path, facts: FileFacts) -> bool:
    """Whether an earlier fetch brought the file whole."""
    if not path.is_file() or path.stat().st_size != facts.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == facts.sha256


def _replace(folder: Path, unfinished: Path) -> None:
    """An engine that has the old files open keeps them until it closes them."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def main(args: Sequence[str]) -> int:
    """Exit code 0: the folder holds the model; 1: it does not; 2: bad flags."""
    parser = argparse.ArgumentParser(
        prog="rempart fetch", description="Bring a model from object storage to a folder.", allow_abbrev=False
    )
    parser.add_argument("source", help=f"s3://BUCKET/PREFIX or file:///FOLDER, with the model's files and {MANIFEST}")
    parser.add_argument("folder", type=Path, help="where to; made, or replaced as a whole")
    parser.add_argument("--public-key", type=Path, help=f"PEM file; require an ed25519 signature in {MANIFEST}.sig")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="files to leave out, such as '*.safetensors'"
    )
    parser.add_argument("--files-at-once", type=int, default=4, help="files brought at a time; default: 4")
    given = parser.parse_args(args)
    if given.files_at_once < 1:
        parser.error("--files-at-once must be at least 1")
    try:
        source = _open(given.source)
    except _FROM_STORE as error:
        parser.error(f"{given.source}: {_first_line(error)}")
    try:
        with tqdm(desc="fetching", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            is_new = fetch_model(
                source,
                given.folder,
                public_key=given.public_key,
                excluded=given.exclude,
                num_files_at_once=given.files_at_once,
                on_progress=show,
            )
    except (FetchError, ManifestError, OSError) as error:
        sys.stderr.write(f"rempart fetch: {error}\n")
        return 1
    sys.stdout.write(f"{given.folder} {'holds' if is_new else 'already holds'} the model of {given.source}\n")
    return 0


def _open(url: str) -> ObjectStore:
    if not url.startswith("s3://"):
        return from_url(url)
    is_plain_http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return from_url(url, client_options={"allow_http": is_plain_http})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
