"""Whatever is done to a chain after it was written is found, and the first bad record is named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.audit.chain import ChainWriter, time_text
from rempart_platform.audit.check import BadChainError, Head
from rempart_platform.audit.signing import Signer, SigningKeyError, read_public_key, read_signing_key
from rempart_platform.audit.testing import CHAIN, START_S, read_chain, write_chain
from rempart_platform.audit.values import Entry, Kind

SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
FORGER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)))
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
signers = st.sampled_from([None, SIGNER])


@given(SIZES, signers)
def test_a_chain_that_nobody_touched_is_right(sizes: list[int], signer: Signer | None) -> None:
    chain = write_chain(sizes, signer)
    public_key = signer.public_key if signer else None
    assert read_chain(chain.segments, head=chain.head, public_key=public_key) == sum(sizes)


@given(SIZES, signers, st.data())
def test_any_flipped_bit_is_found(sizes: list[int], signer: Signer | None, data: st.DataObject) -> None:
    """Also without Redis and without the operator's key."""
    chain = write_chain(sizes, signer)
    path = data.draw(st.sampled_from(sorted(chain.segments)))
    changed = bytearray(chain.segments[path])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BadChainError, match="record"):
        read_chain(chain.segments | {path: bytes(changed)})


@given(SIZES, st.data())
def test_a_segment_that_is_cut_off_anywhere_is_found(sizes: list[int], data: st.DataObject) -> None:
    chain = write_chain(sizes)
    path = data.draw(st.sampled_from(sorted(chain.segments)))
    whole = chain.segments[path]
    with pytest.raises(BadChainError):
        read_chain(chain.segments | {path: whole[: data.draw(st.integers(0, len(whole) - 1))]})


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.data())
def test_a_line_that_is_removed_repeated_or_moved_is_found(sizes: list[int], data: st.DataObject) -> None:
    chain = write_chain(sizes)
    path = data.draw(st.sampled_from(sorted(chain.segments)))
    lines = chain.segments[path].split(b"\n")[:-1]
    line = lines.pop(data.draw(st.integers(0, len(lines) - 1)))
    act = data.draw(st.sampled_from(["remove", "repeat", "move"]))
    kept = list(lines)
    if act != "remove":
        kept.insert(data.draw(st.integers(0, len(kept))), line)
    kept += [line] if act == "repeat" else []
    changed = b"\n".join(kept) + b"\n"
    if changed != chain.segments[path]:
        with pytest.raises(BadChainError):
            read_chain(chain.segments | {path: changed})


@pytest.mark.parametrize(
    ("removed", "named"), [(0, "record 0: it is missing"), (1, "record 2: it is missing"), (2, "record 5: the chain")]
)
def test_a_removed_segment_is_found_at_the_end_too(removed: int, named: str) -> None:
    chain = write_chain([2, 3, 4])
    del chain.segments[sorted(chain.segments)[removed]]
    with pytest.raises(BadChainError, match=f"{CHAIN}, {named}"):
        read_chain(chain.segments, head=chain.head)


def test_all_segments_removed_is_found() -> None:
    chain = write_chain([2, 3])
    with pytest.raises(BadChainError, match="had 5 records"):
        read_chain({}, head=chain.head)
    with pytest.raises(BadChainError, match="no segment"):
        read_chain({})


def test_swapped_segments_are_found() -> None:
    chain = write_chain([3, 3, 3])
    _, second, third = sorted(chain.segments)
    swapped = chain.segments | {second: chain.segments[third], third: chain.segments[second]}
    with pytest.raises(BadChainError, match="record 3: the segment"):
        read_chain(swapped)


def test_a_segment_of_another_chain_or_under_another_name_is_found() -> None:
    chain = write_chain([3, 3])
    first, second = sorted(chain.segments)
    other = {path.replace(CHAIN, "other"): data for path, data in chain.segments.items()}
    with pytest.raises(BadChainError, match="record 0"):
        read_chain(other, chain="other")
    moved = {first: chain.segments[first], second.replace("2023", "2024"): chain.segments[second]}
    with pytest.raises(BadChainError, match="record 3"):
        read_chain(moved)
    with pytest.raises(BadChainError, match="record 6: it is missing"):
        read_chain(chain.segments | {second + ".copy": chain.segments[second]})


def test_a_tail_that_was_written_anew_is_caught_by_redis_or_by_the_signature() -> None:
    true, forged = write_chain([3, 3], SIGNER), write_chain([3, 3], FORGER, tenant="somebody")
    assert read_chain(forged.segments) == 6  # it is consistent in itself
    with pytest.raises(BadChainError, match="record 5: it is not the one that was sealed"):
        read_chain(forged.segments, head=true.head)
    with pytest.raises(BadChainError, match="record 0: the chain is not signed with the given key"):
        read_chain(forged.segments, public_key=SIGNER.public_key)
    # And who leaves the genesis alone has to sign with a key that he does not have.
    (first, second) = sorted(true.segments)
    seal = true.segments[second].split(b"\n")[-2]
    last = seal.replace(seal[-20:-10], b"0123456789")
    tail = true.segments[second].replace(seal, last)
    with pytest.raises(BadChainError, match="signature"):
        read_chain({first: true.segments[first], second: tail}, public_key=SIGNER.public_key)


def test_a_tail_that_is_cut_otherwise_than_it_was_sealed_is_found() -> None:
    true, longer = write_chain([3, 3]), write_chain([3, 5])
    with pytest.raises(BadChainError, match="record 5: no segment ends with it"):
        read_chain(longer.segments, head=true.head)


def test_what_was_sealed_after_redis_was_asked_is_no_problem() -> None:
    chain = write_chain([2, 2])
    assert read_chain(write_chain([2, 2, 3]).segments, head=chain.head) == 7
    assert read_chain(chain.segments, head=Head()) == 4
    assert read_chain({}, head=Head()) == 0


def _change(number: int) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(b'"prompt_tokens":%d,' % number, b'"prompt_tokens":999,')


@pytest.mark.parametrize("number", [3, 4, 5])
def test_the_first_bad_record_is_named(number: int) -> None:
    chain = write_chain([3, 3])
    second = sorted(chain.segments)[1]
    changed = chain.segments | {second: _change(number)(chain.segments[second])}
    with pytest.raises(BadChainError, match=f"record {number}: it"):
        read_chain(changed)


def test_nothing_comes_after_the_end_and_no_second_genesis() -> None:
    def chain(*kinds: Kind) -> dict[str, bytes]:
        segment = ChainWriter(CHAIN).seal([Entry(START_S, kind, {"public_key": ""}) for kind in kinds])
        return {segment.path: segment.data}

    assert read_chain(chain(Kind.GENESIS, Kind.REQUEST, Kind.END)) == 3
    for kinds in ((Kind.REQUEST,), (Kind.GENESIS, Kind.GENESIS), (Kind.GENESIS, Kind.END, Kind.REQUEST)):
        with pytest.raises(BadChainError, match=f"no '{kinds[-1]}' can be there"):
            read_chain(chain(*kinds))


def test_a_clock_that_is_set_back_over_midnight_keeps_the_order() -> None:
    writer, midnight = ChainWriter(CHAIN), 1_700_006_400.0
    segments = [
        writer.seal([Entry(at_s, Kind.REQUEST if number else Kind.GENESIS, {"public_key": ""})])
        for number, at_s in enumerate((midnight - 1, midnight + 1, midnight - 1))
    ]
    assert [segment.path for segment in segments] == sorted(segment.path for segment in segments)
    assert read_chain({segment.path: segment.data for segment in segments}) == 3
    assert time_text(midnight - 1) in segments[2].data.decode()


def test_keys_are_pem_files_of_ed25519(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    private, public, other = tmp_path / "private", tmp_path / "public", tmp_path / "other"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    other.write_text("no key")
    assert read_signing_key(private).public_key == read_public_key(public)
    for read, path in ((read_signing_key, other), (read_public_key, other), (read_public_key, tmp_path / "none")):
        with pytest.raises(SigningKeyError, match=path.name):
            read(path)


def test_a_record_cannot_take_the_place_of_the_chains_own_fields() -> None:
    fields: dict[str, object] = {"n": 7, "previous": "mine", "kind": "end", "public_key": ""}
    entry = replace(Entry(START_S, Kind.GENESIS, {}), fields=fields)
    segment = ChainWriter(CHAIN).seal([entry])
    assert read_chain({segment.path: segment.data}) == 1
