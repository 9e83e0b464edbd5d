"""Which inputs are refused, and how those that are not are cut."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.batch.config import BatchConfig
from rempart_platform.batch.input_check import BadInputError, check_input
from rempart_platform.batch.input_lines import LineTooLongError, read_lines, split_lines
from rempart_platform.batch.plan import Plan, Shard
from rempart_platform.batch.testing import ENDPOINT, MODEL, as_input, in_pieces, request_line
from rempart_platform.batch.values import BatchLimits, InputError

CONFIG = BatchConfig(lines_per_shard=3, limits=BatchLimits(max_lines=20, max_line_bytes=400, max_input_errors=5))


async def plan_of(content: bytes, config: BatchConfig = CONFIG) -> Plan:
    return await check_input(in_pieces(content, 50), ENDPOINT, config, lambda model: model in (MODEL, "other"))


async def errors_of(content: bytes, config: BatchConfig = CONFIG) -> tuple[InputError, ...]:
    with pytest.raises(BadInputError) as caught:
        await plan_of(content, config)
    return caught.value.errors


async def test_an_input_is_cut_by_lines_and_blank_ones_do_not_count() -> None:
    lines = [as_input([request_line(number)]) for number in range(4)]
    content = lines[0] + b"\n" + lines[1] + b" \r\n" + lines[2] + lines[3].rstrip()  # no end of line at the end
    plan = await plan_of(content)
    assert (plan.model, plan.num_lines) == (MODEL, 4)
    first, second = plan.shards
    assert (first.first_line, first.num_lines) == (1, 3)
    assert (second.first_line, second.num_lines) == (6, 1)
    assert [line.number for line in split_lines(content[first.start : first.end], first.first_line)] == [1, 3, 5]
    assert json.loads(content[second.start : second.end]) == request_line(3)
    assert Plan.decode(plan.encoded()) == plan


async def test_an_input_is_cut_by_bytes_too() -> None:
    content = as_input([request_line(number) for number in range(6)])
    size = len(content) // 6
    plan = await plan_of(content, replace(CONFIG, max_shard_bytes=2 * size + 5))
    assert [shard.num_lines for shard in plan.shards] == [2, 2, 2]
    plan = await plan_of(content, replace(CONFIG, max_shard_bytes=1))
    assert [shard.num_lines for shard in plan.shards] == [1] * 6


@given(content=st.text("ab\n \r", max_size=60), size=st.integers(1, 9))
async def test_lines_are_the_same_in_whatever_pieces_they_come(content: str, size: int) -> None:
    data = content.encode()
    lines = [line async for line in read_lines(in_pieces(data, size), max_line_bytes=100)]
    assert lines == list(split_lines(data, 1))
    for line in lines:
        assert data[line.start : line.end] == line.data
        assert data[: line.start].count(b"\n") == line.number - 1


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff\xfe{}", "invalid_json_line", None),
        (b"[" * 200, "invalid_json_line", None),
        (b"[]", "invalid_request", None),
        (as_input([request_line(1, custom_id=1)]), "invalid_request", None),
        (as_input([{"method": "POST", "url": ENDPOINT, "body": {}}]), "invalid_request", None),
        (as_input([request_line(1, custom_id="")]), "invalid_custom_id", "custom_id"),
        (as_input([request_line(1, custom_id="line-0")]), "duplicate_custom_id", "custom_id"),
        (as_input([request_line(1, method="GET")]), "invalid_method", "method"),
        (as_input([request_line(1, url="/v1/embeddings")]), "mismatched_url", "url"),
        (as_input([request_line(1, body=[])]), "invalid_body", "body"),
        (as_input([request_line(1, body={"prompt": "x"})]), "invalid_body", "body"),
        (as_input([request_line(1, body={"model": "none"})]), "model_not_found", "body.model"),
        (as_input([request_line(1, body={"model": "other"})]), "mismatched_model", "body.model"),
        (b'"' + b"x" * 400 + b'"', "line_too_long", None),
    ],
)
async def test_what_is_wrong_with_a_line_is_said_with_its_number(line: bytes, code: str, param: str | None) -> None:
    (error,) = await errors_of(as_input([request_line(0)]) + line.rstrip() + b"\n")
    assert (error.code, error.param, error.line) == (code, param, 2)
    assert error.message


async def test_a_custom_id_may_have_a_length_that_is_named() -> None:
    config = replace(CONFIG, limits=replace(CONFIG.limits, max_custom_id_chars=6))
    (error,) = await errors_of(as_input([request_line(0), request_line(10)]), config)
    assert (error.code, error.line) == ("invalid_custom_id", 2)
    assert "max_custom_id_chars" in error.message


async def test_no_error_repeats_a_name_as_long_as_its_line() -> None:
    """All of them are kept in Redis, and read with the batch each time."""
    config = replace(CONFIG, limits=BatchLimits())
    (error,) = await errors_of(as_input([request_line(0, body={"model": "\0" * 100_000})]), config)
    assert error.code == "model_not_found"
    assert len(error.message) < 1000


async def test_online_requests_have_their_turns_while_an_input_of_blank_lines_is_read() -> None:
    num_turns = 0

    async def count_turns() -> None:
        nonlocal num_turns
        while True:
            await asyncio.sleep(0)
            num_turns += 1

    counting = asyncio.create_task(count_turns())
    await asyncio.sleep(0)
    with pytest.raises(BadInputError):
        await check_input(in_pieces(b"\n" * 2**20, 2**20), ENDPOINT, CONFIG, lambda model: True)
    counting.cancel()
    assert num_turns >= 2**20 // 2**16


async def test_blank_lines_that_are_very_many_end_a_shard() -> None:
    content = b"\n".join([as_input([request_line(0)]), b"\n" * 5000, as_input([request_line(1)])])
    config = replace(CONFIG, limits=BatchLimits())
    assert [(shard.first_line, shard.num_lines) for shard in (await plan_of(content, config)).shards] == [
        (1, 1),
        (5004, 1),
    ]


async def test_an_empty_input_and_one_that_is_too_long_are_refused() -> None:
    (error,) = await errors_of(b"\n \n")
    assert (error.code, error.line) == ("empty_file", None)
    (error,) = await errors_of(as_input([request_line(number) for number in range(21)]))
    assert error.code == "too_many_lines"
    assert "max_lines" in error.message


async def test_no_more_errors_are_named_than_allowed() -> None:
    assert len(await errors_of(b"{\n" * 19)) == CONFIG.limits.max_input_errors


async def test_reading_stops_at_a_line_without_end() -> None:
    num_pieces = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_pieces
        while True:
            num_pieces += 1
            yield b"x" * 100

    with pytest.raises(LineTooLongError):
        async for _ in read_lines(endless(), 1000):
            pass
    assert num_pieces == 11


def test_a_shard_is_a_range_of_bytes() -> None:
    assert Plan("fake", (Shard(0, 10, 1, 2), Shard(11, 15, 4, 1))).num_lines == 3
