"""Bytes to text as they come: a character is given out when its last byte is there, never in halves."""

import codecs

_new_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Joining all results equals decoding all bytes at once; bytes that are no character become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = _new_decoder(errors="replace")
        self.has_partial = False
        """Whether the first bytes of a character wait for the rest."""

    def push(self, data: bytes) -> str:
        """The characters that `data` completes."""
        if not self.has_partial:
            try:
                return data.decode()  # nearly all tokens are whole characters, and this is the quick way
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(data)
        self.has_partial = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """What the bytes still waiting stand for, now that no more come."""
        self.has_partial = False
        return self._decoder.decode(b"", final=True)
