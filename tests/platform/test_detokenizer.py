"""text/detokenizer.py"""

from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.text.detokenizer import IncrementalDetokenizer


@given(st.binary(max_size=60), st.data())
def test_any_split_of_any_bytes_gives_the_text_of_the_whole(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=10)))
    detokenizer = IncrementalDetokenizer()
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    text = "".join(detokenizer.push(part) for part in parts) + detokenizer.finish()

    assert text == data.decode("utf-8", errors="replace")


@given(st.text(max_size=30))
def test_byte_by_byte_no_half_of_a_character_is_given_out(text: str) -> None:
    detokenizer = IncrementalDetokenizer()

    pushed = "".join(detokenizer.push(bytes([byte])) for byte in text.encode())

    assert pushed == text
    assert not detokenizer.has_partial
    assert detokenizer.finish() == ""


def test_a_character_that_never_ends_is_shown_as_a_replacement() -> None:
    detokenizer = IncrementalDetokenizer()

    assert detokenizer.push("é".encode()[:1]) == ""
    assert detokenizer.has_partial
    assert detokenizer.finish() == "�"


def test_an_invalid_byte_does_not_swallow_what_follows() -> None:
    detokenizer = IncrementalDetokenizer()

    assert detokenizer.push(b"a\xff") + detokenizer.push(b"b") == "a�b"
