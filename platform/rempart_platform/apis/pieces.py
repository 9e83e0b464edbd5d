"""Contents on their way out, in pieces that a slow reader may leave lying."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

MAX_PIECE_BYTES: Final = 256 * 1024


async def small_pieces(content: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes, at most `MAX_PIECE_BYTES` at a time and never none. Closing it closes the content."""
    try:
        async for piece in content:
            for start in range(0, len(piece), MAX_PIECE_BYTES):
                yield piece[start : start + MAX_PIECE_BYTES]
    finally:
        if isinstance(content, AsyncGenerator):
            await content.aclose()
