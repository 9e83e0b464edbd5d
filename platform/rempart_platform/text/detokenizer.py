"""Bytes to text as they come: a character is given out when its last byte is there, never in halves."""

import codecs

_new_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Joining all results equals decoding all bytes at once; bytes that are no character become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = _new_decoder(errors="replace")

    def push(self, data: bytes) -> str:
        """The characters that `data` completes."""
        return self._decoder.decode(data)

    @property
    def has_partial(self) -> bool:
        """Whether the first bytes of a character wait for the rest."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """What the bytes still waiting stand for, now that no more come."""
        return self._decoder.decode(b"", final=True)
