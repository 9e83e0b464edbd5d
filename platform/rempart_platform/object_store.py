"""Object storage for what outlives a request and is too large for Redis: a folder, or a bucket of any S3 service.

file:///var/lib/rempart     a folder of this machine, made when it is not there
s3://bucket/prefix          AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL say where and who
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.store import LocalStore, ObjectStore, S3Store

__all__ = ["ObjectStore", "ObjectStoreUrlError", "open_object_store", "remove_unfinished", "sync_to_disk"]


class ObjectStoreUrlError(ValueError):
    """What is wrong with the URL."""


def open_object_store(url: str, environ: Mapping[str, str] = os.environ, *, for_reading: bool = False) -> ObjectStore:
    """A store whose paths are relative to the URL. Nothing is asked of it yet.

    Args:
        url: where it is.
        environ: says who asks a bucket.
        for_reading: makes no folder; one that is not there is a mistake.

    Raises:
        ObjectStoreUrlError: neither file:///FOLDER nor s3://BUCKET[/PREFIX], or the folder is not there or cannot be
            made.
    """
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme == "file" and not parts.netloc and path.strip("/"):
        return _folder(Path(path), for_reading=for_reading)
    if parts.scheme == "s3" and parts.netloc:
        return _bucket(parts.netloc, path.strip("/"), environ)
    raise ObjectStoreUrlError(f"{url!r} is neither file:///FOLDER nor s3://BUCKET/PREFIX")


def remove_unfinished(store: ObjectStore, path: str) -> None:
    """Removes what writers that died have left of an object, or of all objects below a path. Blocks.

    In a folder these are files `<object>#<number>`, which the store does not list. In a bucket they are unfinished
    uploads, which a lifecycle rule of its operator removes.
    """
    if not isinstance(store, LocalStore) or store.prefix is None:
        return
    place = Path(store.prefix) / path
    with contextlib.suppress(FileNotFoundError):  # the folder itself
        for left in (*place.parent.glob(f"{place.name}#*"), *place.rglob("*#*")):
            left.unlink(missing_ok=True)  # somebody else removes them too


def sync_to_disk(store: ObjectStore, path: str) -> None:
    """Returns when an object, and its name in every folder down from the store's own, outlives a loss of power. Blocks.

    A bucket needs nothing of that: what it has taken is kept.

    Raises:
        OSError: the disk cannot keep it, or it is not there.
    """
    if not isinstance(store, LocalStore) or store.prefix is None:
        return
    root = Path(store.prefix)
    for place in (Path(path), *Path(path).parents):
        _sync(root / place)


def _sync(place: Path) -> None:
    opened = os.open(place, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _folder(path: Path, *, for_reading: bool) -> ObjectStore:
    if for_reading and not path.is_dir():
        raise ObjectStoreUrlError(f"there is no folder {path}")
    try:
        return LocalStore(path, automatic_cleanup=True, mkdir=True)
    except OSError as error:
        raise ObjectStoreUrlError(f"the folder {path} cannot be made: {error}") from None


def _bucket(bucket: str, prefix: str, environ: Mapping[str, str]) -> ObjectStore:
    endpoint = environ.get("AWS_ENDPOINT_URL", "")
    return S3Store(
        bucket,
        prefix=prefix or None,
        endpoint=endpoint or None,
        region=environ.get("AWS_REGION") or None,
        access_key_id=environ.get("AWS_ACCESS_KEY_ID") or None,
        secret_access_key=environ.get("AWS_SECRET_ACCESS_KEY") or None,
        client_options={"allow_http": endpoint.startswith("http://")},
    )
