"""A bucket of a real S3 service, on this machine."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

_KEY_ID, _SECRET, _REGION = "id", "secret", "fr-par"


@dataclass(frozen=True, slots=True)
class Bucket:
    """An empty bucket of a name of its own, for the servers of one process share their buckets."""

    name: str
    endpoint: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def environ(self) -> dict[str, str]:
        """What programs read to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": _KEY_ID,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": _REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def upload(self, path: Path, name: str) -> None:
        self._client().upload_file(str(path), self.name, name)

    def create(self) -> None:
        self._client().create_bucket(Bucket=self.name, CreateBucketConfiguration={"LocationConstraint": _REGION})

    def _client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=_REGION,
            aws_access_key_id=_KEY_ID,
            aws_secret_access_key=_SECRET,
        )


@contextmanager
def running_bucket() -> Iterator[Bucket]:
    """A bucket and its server, until the block ends."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        bucket = Bucket(f"bucket-{secrets.token_hex(4)}", "http://{}:{}".format(*server.get_host_and_port()))
        bucket.create()
        yield bucket
    finally:
        server.stop()
