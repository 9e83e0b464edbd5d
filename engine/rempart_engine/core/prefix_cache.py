"""Which KV block holds the content of a given run of tokens."""

import struct
from collections.abc import Iterable, Sequence
from hashlib import sha256

from rempart_engine.core.integrity import IntegrityError


def root_digest(cache_salt: bytes) -> bytes:
    """Start of the hash chain: requests with different salts never share a digest."""
    return sha256(cache_salt).digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block: of everything before it (`parent`) and its own token ids as little-endian uint32."""
    return sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


class PrefixCache:
    """Digest of a full block -> id of the KV block that holds its content, one to one.

    Only computed blocks are inserted. An entry lives until its block is evicted, in use or free.
    """

    def __init__(self) -> None:
        self._block_ids: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_ids)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._digests

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest run of digests, from the first, that is all cached."""
        block_ids = []
        for digest in digests:
            block_id = self._block_ids.get(digest)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def insert(self, digest: bytes, block_id: int) -> None:
        """Make a computed block findable; when another block holds the same content already, that one stays."""
        if digest not in self._block_ids and block_id not in self._digests:
            self._block_ids[digest] = block_id
            self._digests[block_id] = digest

    def evict(self, block_id: int) -> None:
        """The block's content is about to go, or not to be trusted; unknown blocks are fine."""
        digest = self._digests.pop(block_id, None)
        if digest is not None:
            del self._block_ids[digest]

    def check_integrity(self) -> None:
        """Raises IntegrityError when the two directions differ."""
        if {block_id: digest for digest, block_id in self._block_ids.items()} != self._digests:
            raise IntegrityError("prefix cache: digests and blocks are not one to one")
