"""chat/reasoning.py, chat/dsml_calls.py and chat/tool_token_calls.py: answers of DeepSeek-V3.2 as they come"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rempart_platform.chat.call_ids import mint_call_id
from rempart_platform.chat.dsml import calls_block
from rempart_platform.chat.dsml_calls import DsmlCalls
from rempart_platform.chat.dsml_scanner import MARKED_CALLS
from rempart_platform.chat.message import Tool
from rempart_platform.chat.output import (
    ContentText,
    OutputParser,
    OutputPart,
    ReasoningText,
    ToolCallArguments,
    ToolCallStart,
)
from rempart_platform.chat.prompt import Control
from rempart_platform.chat.reasoning import ReasoningParser
from rempart_platform.chat.tool_token_calls import ToolTokenCalls
from rempart_platform.chat.turns import Call

WEATHER = Tool(
    "weather",
    parameters=json.dumps(
        {
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "metric": {"type": ["boolean", "null"]},
                "scale": {"type": "number"},
                "hours": {"type": "array"},
                "unit": {"enum": ["C", "F"]},
                "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "any": {},
            }
        }
    ),
)
TOOLS = (WEATHER, Tool("now"))

SHORT_NAMES = {
    "§": "｜DSML｜",
    "[calls]": "<｜tool▁calls▁begin｜>",
    "[/calls]": "<｜tool▁calls▁end｜>",
    "[call]": "<｜tool▁call▁begin｜>",
    "[/call]": "<｜tool▁call▁end｜>",
    "[sep]": "<｜tool▁sep｜>",
}


def full(text: str) -> str:
    """The text with the format's own names of its tags."""
    for short, name in SHORT_NAMES.items():
        text = text.replace(short, name)
    return text


def v32(is_thinking: bool = False) -> OutputParser:
    ids = (f"id{number}" for number in count())
    return ReasoningParser(is_thinking, DsmlCalls(TOOLS, ids.__next__), ends_at=(MARKED_CALLS,))


def exp(is_thinking: bool = False) -> OutputParser:
    ids = (f"id{number}" for number in count())
    return ReasoningParser(is_thinking, ToolTokenCalls(TOOLS, ids.__next__))


def thinking() -> OutputParser:
    return v32(is_thinking=True)


def plain(is_thinking: bool = False) -> OutputParser:
    return ReasoningParser(is_thinking)


def parse(parser: OutputParser, pieces: Iterable[str]) -> list[OutputPart]:
    """All parts, neighbours of one kind as one."""
    parts = [part for piece in pieces for part in parser.push(piece)]
    return merged([*parts, *parser.finish()])


def merged(parts: Sequence[OutputPart]) -> list[OutputPart]:
    result: list[OutputPart] = []
    for part in parts:
        before = result[-1] if result else None
        if isinstance(part, ToolCallStart) or type(before) is not type(part):
            result.append(part)
        elif isinstance(before, ContentText | ReasoningText | ToolCallArguments):
            result[-1] = replace(before, text=before.text + part.text)
    return result


def content_of(parts: Sequence[OutputPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, ContentText))


def calls_of(parts: Sequence[OutputPart]) -> list[tuple[str, str]]:
    """Name and arguments of each call."""
    names = {part.index: part.name for part in parts if isinstance(part, ToolCallStart)}
    texts = dict.fromkeys(names, "")
    for part in parts:
        if isinstance(part, ToolCallArguments):
            texts[part.index] += part.text
    return [(names[index], texts[index]) for index in names]


@dataclass(frozen=True)
class Answer:
    """`text` is parsed to the reasoning, the content and the calls."""

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    content: str = ""
    reasoning: str = ""
    parser: Callable[[], OutputParser] = v32


def section(*invokes: str, mark: str = "§") -> str:
    return f"\n\n<{mark}function_calls>\n" + "\n".join(invokes) + f"\n</{mark}function_calls>"


CITY = '<§parameter name="city" string="true">杭州</§parameter>'
INVOKE = f'<§invoke name="weather">\n{CITY}\n</§invoke>'
CITY_CALL = ("weather", '{"city": "杭州"}')


def with_parameter(parameter: str, arguments: str) -> Answer:
    return Answer(section(f'<§invoke name="weather">\n{parameter}\n</§invoke>'), (("weather", arguments),))


PARAMETERS = {
    "a number": ("days", "false", " 3 ", '{"days": 3}'),
    "a whole number as a fraction": ("days", "false", "3.0", '{"days": 3}'),
    "a number that is none": ("days", "false", "three", '{"days": "three"}'),
    "a number said to be a string": ("days", "true", "3", '{"days": 3}'),
    "a fraction": ("scale", "false", "1.50", '{"scale": 1.50}'),
    "an integer for a fraction": ("scale", "false", "2", '{"scale": 2}'),
    "no JSON number": ("scale", "false", "NaN", '{"scale": "NaN"}'),
    "a string said to be none": ("city", "false", "Rome", '{"city": "Rome"}'),
    "a string like a number": ("city", "false", "12", '{"city": "12"}'),
    "a quoted string": ("city", "false", '"Rome"', '{"city": "Rome"}'),
    "a boolean as in Python": ("metric", "false", "True", '{"metric": true}'),
    "null as in Python": ("metric", "false", "None", '{"metric": null}'),
    "one of a choice": ("unit", "true", "C", '{"unit": "C"}'),
    "one of several schemas": ("limit", "false", "null", '{"limit": null}'),
    "a list": ("hours", "false", '[1, {"a": "é"}]', '{"hours": [1, {"a": "é"}]}'),
    "a list said to be a string": ("hours", "true", "[1]", '{"hours": [1]}'),
    "any type": ("any", "false", '{"a": 1}', '{"any": {"a": 1}}'),
    "any type as a string": ("any", "true", "1", '{"any": "1"}'),
    "nothing said of a string": ("city", None, "12", '{"city": "12"}'),
    "nothing said of a number": ("days", None, "12", '{"days": 12}'),
    "nothing, of a type that may be null": ("limit", "false", "", '{"limit": null}'),
    "nothing, of any type": ("any", "false", "", '{"any": ""}'),
    "Python's word, of any type": ("any", None, "True", '{"any": "True"}'),
    "unknown parameter": ("x", "true", "1", '{"x": "1"}'),
    "a wrapper": ("arguments", "false", '{"city":"Rome"}', '{"city": "Rome"}'),
    "a wrapper with text": ("input", "true", '{"days": 3}', '{"days": 3}'),
    "a wrapper of strangers": ("input", "false", '{"z": 3}', '{"input": {"z": 3}}'),
    "a wrapper of no JSON": ("input", "true", "go", '{"input": "go"}'),
}
"""A parameter's name, what its tag says of strings, its text, and the arguments that come of it."""


def parameter_answer(name: str, string: str | None, text: str, arguments: str) -> Answer:
    attribute = "" if string is None else f' string="{string}"'
    return with_parameter(f'<§parameter name="{name}"{attribute}>{text}</§parameter>', arguments)


ANSWERS = {
    "nothing": Answer(""),
    "content": Answer("Hi\n", content="Hi\n"),
    "whitespace": Answer(" \n", content=" \n"),
    "content that speaks of tags": Answer(
        "a <b> </think> <think> <invoke <param <§", content="a <b> </think> <think> <invoke <param <§"
    ),
    "chat: the prompt's tag again": Answer("</think>Hi", content="Hi"),
    "chat: the model thinks all the same": Answer("\n<think>Hm</think>Hi", content="Hi", reasoning="Hm"),
    "thinking": Answer("Hm</think>Hi", content="Hi", reasoning="Hm", parser=thinking),
    "thinking: the prompt's tag again": Answer(
        "<think>\nHm</think>Hi", content="Hi", reasoning="\nHm", parser=thinking
    ),
    "thinking: ended twice": Answer("Hm</think>\n</think>Hi", content="Hi", reasoning="Hm", parser=thinking),
    "thinking: begun again": Answer("A</think><think>B</think>Hi", content="Hi", reasoning="AB", parser=thinking),
    "thinking: about a tag": Answer(
        "Hm <think> </thin</think>Hi", content="Hi", reasoning="Hm <think> </thin", parser=thinking
    ),
    "thinking: nothing": Answer("</think>Hi", content="Hi", parser=thinking),
    "thinking: cut off": Answer("Hm</thi", reasoning="Hm</thi", parser=thinking),
    "thinking: whitespace": Answer("\n", reasoning="\n", parser=thinking),
    "no tools": Answer("Hi" + section(INVOKE), content="Hi" + section(INVOKE), parser=plain),
    "a call": Answer(section(INVOKE), (CITY_CALL,)),
    "a call behind content": Answer("Sure." + section(INVOKE), (CITY_CALL,), "Sure."),
    "a call behind reasoning": Answer("Hm</think>Sure." + section(INVOKE), (CITY_CALL,), "Sure.", "Hm", thinking),
    "a call that ends reasoning": Answer("Hm" + section(INVOKE), (CITY_CALL,), "", "Hm\n\n", thinking),
    "content behind a call": Answer(section(INVOKE) + "\nDone. \n", (CITY_CALL,), "\nDone. \n"),
    "whitespace behind a call": Answer(section(INVOKE) + "\n", (CITY_CALL,)),
    "several calls": Answer(
        section(INVOKE, '<§invoke name="now">\n\n</§invoke>', INVOKE), (CITY_CALL, ("now", "{}"), CITY_CALL)
    ),
    "several sections": Answer(section(INVOKE) + "And" + section(INVOKE), (CITY_CALL, CITY_CALL), "And"),
    "no whitespace at all": Answer("a" + section(INVOKE).replace("\n", ""), (CITY_CALL,), "a"),
    "much whitespace": Answer(section(INVOKE).replace("\n", "\n\t ").replace(">杭", " >杭"), (CITY_CALL,)),
    "unknown tool": Answer(section('<§invoke name="f"></§invoke>'), (("f", "{}"),)),
    "plain tags": Answer(section(INVOKE, mark="").replace("§", ""), (CITY_CALL,)),
    "plain tags inside of marked ones": Answer(section(INVOKE.replace("§", "")), (CITY_CALL,)),
    "marked tags inside of plain ones": Answer(section(INVOKE, mark=""), (CITY_CALL,)),
    "marked parameter, plain end": Answer(section(INVOKE.replace("</§parameter", "</parameter")), (CITY_CALL,)),
    "plain parameter, marked end": Answer(section(INVOKE.replace("<§parameter", "<parameter")), (CITY_CALL,)),
    "marked invoke, plain end": Answer(section(INVOKE.replace("</§invoke", "</invoke")), (CITY_CALL,)),
    "marked section, plain end": Answer(section(INVOKE).replace("</§function", "</function"), (CITY_CALL,)),
    "a value with the other style's end": with_parameter(
        '<§parameter name="city" string="true"><a></parameter> </parameter>\n<b/></§parameter>',
        '{"city": "<a></parameter> </parameter>\\n<b/>"}',
    ),
    "a value that ends in the other style after its own words": with_parameter(
        '<§parameter name="city" string="true">x</parameter>y</parameter> \n'
        '<parameter name="days" string="false">1</parameter>',
        '{"city": "x</parameter>y", "days": 1}',
    ),
    "a value with plain tags": with_parameter(
        '<§parameter name="city" string="true"><invoke name="x"></invoke></function_calls></§parameter>',
        '{"city": "<invoke name=\\"x\\"></invoke></function_calls>"}',
    ),
    "a value to escape": with_parameter(
        '<§parameter name="city" string="true">"a"\\\n\t<</§parameter>', '{"city": "\\"a\\"\\\\\\n\\t<"}'
    ),
    "a JSON body": Answer(
        section('<§invoke name="weather">\n{\n "city": "杭州"}\n</§invoke>'), (("weather", '{\n "city": "杭州"}'),)
    ),
    "a JSON body in plain tags": Answer(
        section('<invoke name="weather">\n{"city": "</parameter>", "days": 3}\n</invoke>', mark=""),
        (("weather", '{"city": "</parameter>", "days": 3}'),),
    ),
    "an empty JSON body": Answer(section('<§invoke name="now">{}</§invoke>'), (("now", "{}"),)),
    "marked call without a section": Answer(
        "Sure.\n" + INVOKE + "\n" + INVOKE + "\nDone.", (CITY_CALL, CITY_CALL), "Sure.\nDone."
    ),
    "a section without its end": Answer(
        "Sure." + section(INVOKE).removesuffix("</§function_calls>"), (CITY_CALL,), "Sure."
    ),
    "a wrapper among others": with_parameter(
        '<§parameter name="input" string="true">{}</§parameter><§parameter name="days" string="false">3</§parameter>',
        '{"input": "{}", "days": 3}',
    ),
    "a wrapper as JSON body": Answer(
        section('<§invoke name="weather">{"arguments": {"city": "Rome"}}</§invoke>'), (("weather", '{"city": "Rome"}'),)
    ),
    "many parameters": with_parameter(
        f'{CITY}\n<§parameter name="days" string="false">3</§parameter>\n'
        '<§parameter name="unit" string="true">C</§parameter>',
        '{"city": "杭州", "days": 3, "unit": "C"}',
    ),
    "a broken call beside a whole one": Answer(
        section('<§invoke name="weather">\nCITY\n</§invoke>', INVOKE),
        (CITY_CALL,),
        '\n\n<§function_calls>\n<§invoke name="weather">\nCITY\n</§invoke>\n</§function_calls>',
    ),
    "a broken call behind a whole one": Answer(
        section(INVOKE, '<§invoke name="weather">\n{"city": </§invoke>', INVOKE),
        (CITY_CALL, CITY_CALL),
        '\n<§invoke name="weather">\n{"city": </§invoke>',
    ),
    "a value without its end, before another call": Answer(
        section('<§invoke name="weather">\n<§parameter name="days" string="false">3\n', INVOKE),
        (CITY_CALL,),
        '\n\n<§function_calls>\n<§invoke name="weather">\n<§parameter name="days" string="false">3\n</§function_calls>',
    ),
    "a call that breaks off in a string": Answer(
        section('<§invoke name="weather">\n<§parameter name="city" string="true">Ro\n</§invoke>'),
        (("weather", '{"city": "Ro\\n'),),
        "</§invoke>",
    ),
    "a call that breaks off behind a string": Answer(
        section(f'<§invoke name="weather">\n{CITY}\nand so on\n</§invoke>', INVOKE),
        (("weather", '{"city": "杭州"'), CITY_CALL),
        "\nand so on\n</§invoke>",
    ),
    "a call cut off in a string": Answer(section(INVOKE).partition("州")[0], (("weather", '{"city": "杭'),)),
    "a call cut off behind a string": Answer(
        section(INVOKE).partition("</§invoke")[0] + '<§parameter name="days" string="false">1',
        (("weather", '{"city": "杭州"'),),
        '\n<§parameter name="days" string="false">1',
    ),
    "Exp: content": Answer("Hi <", content="Hi <", parser=exp),
    "Exp: a call": Answer(
        'Sure.[calls][call]weather[sep]{"city": "杭州"}[/call][/calls]', (CITY_CALL,), "Sure.", parser=exp
    ),
    "Exp: several calls": Answer(
        '\n[calls][call]weather[sep]{"city": "杭州"}[/call]\n[call]now[sep][/call][/calls]\n',
        (CITY_CALL, ("now", "{}")),
        parser=exp,
    ),
    "Exp: without the call's end": Answer(
        '[calls][call]weather[sep]{"city": "杭州"}[/calls]', (CITY_CALL,), parser=exp
    ),
    "Exp: without the section's end": Answer(
        '[calls][call]weather[sep]{"city": "杭州"}[/call]', (CITY_CALL,), parser=exp
    ),
    "Exp: a wrapper": Answer(
        '[calls][call]weather[sep]{"input": {"days": 3}}[/call][/calls]', (("weather", '{"days": 3}'),), parser=exp
    ),
    "Exp: a broken call behind a whole one": Answer(
        '[calls][call]weather[sep]{"city": "杭州"}[/call][call]weather[sep]{"city[/call][/calls]',
        (CITY_CALL,),
        '[call]weather[sep]{"city[/call]',
        parser=exp,
    ),
    **{name: parameter_answer(*row) for name, row in PARAMETERS.items()},
}

MALFORMED = [
    section(""),
    section("Sure."),
    "\n\n<§function_calls>",
    "\n\n<§function_calls",
    "Hi </§function_calls>",
    section('<§invoke name="weather">\nRome\n</§invoke>'),
    section('<§invoke name="weather">\n{"city": }\n</§invoke>'),
    section('<§invoke name="weather">\n{"city": NaN}\n</§invoke>'),
    section('<§invoke name="weather">\n["city"]\n</§invoke>'),
    section('<§invoke name="weather">\n{"city": 1}'),
    section('<§invoke name="weather">\n{} {}\n</§invoke>'),
    section('<§invoke name="weather">\n' + "[" * 5000),
    section('<§invoke name="weather">\n{"a": ' + "[" * 5000 + "]" * 5000 + "}</§invoke>"),
    section('<§invoke name="">\n</§invoke>'),
    section("<§invoke>\n</§invoke>"),
    section('<§invoke nme="weather">\n</§invoke>'),
    section("<§invoke name='weather'>\n</§invoke>"),
    section('<§invoke name="weather" x="y">\n</§invoke>'),
    section('<§invoke name="weather"\n</§invoke>'),
    section('<§invoke name="' + "w" * 600 + '">\n</§invoke>'),
    section('<§invoke name="weather">\n<§parameter name="days">3</§invoke>'),
    section('<§invoke name="weather">\n<§parameter name="days" string="maybe">3</§parameter></§invoke>'),
    section('<§invoke name="weather">\n<§parameter name="days" string="false">3</§parameter>'),
    section('<§invoke name="weather">\n<§parameter name="days" string="false">3'),
    section('<§invoke name="weather">\n<§parameter name="days" string="false">3</parameter>'),
    section(
        '<§invoke name="weather">\n<§parameter name="days" string="false">1</§parameter>'
        '<§parameter name="days" string="false">2</§parameter></§invoke>'
    ),
    section('<parameter name="days" string="false">1</parameter>'),
    section("<§invoke name='weather'>").replace("function_calls", "functioncalls"),
    '<§invoke name="stranger">\n</§invoke>',
    '<invoke name="weather">\n</invoke>',
    '<§invoke name="weather">\nRome\n</§invoke>',
]
MALFORMED_EXP = [
    "[calls][/calls]",
    "[calls]Sure.[/calls]",
    "[calls] [call",
    "[call]weather[sep]{}[/call]",
    "[calls][call]weather[/call][/calls]",
    "[calls][call][sep]{}[/call][/calls]",
    "[calls][call]weather[sep]Rome[/call][/calls]",
    "[calls][call]weather[sep]{[/calls]",
    "[calls][call]weather[sep]{}[call]",
    "[calls][call]weather[sep]{}[sep]{}[/call][/calls]",
    "Hi[/calls][sep]",
]


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_is_parted(answer: Answer) -> None:
    text = full(answer.text)

    parts = parse(answer.parser(), [text])

    assert "".join(part.text for part in parts if isinstance(part, ReasoningText)) == answer.reasoning
    assert content_of(parts) == full(answer.content)
    assert calls_of(parts) == [(name, full(arguments)) for name, arguments in answer.calls]
    assert [(part.index, part.id) for part in parts if isinstance(part, ToolCallStart)] == [
        (number, f"id{number}") for number in range(len(answer.calls))
    ]


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_is_parted_the_same_however_it_comes(answer: Answer) -> None:
    text = full(answer.text)
    whole = parse(answer.parser(), [text])

    assert parse(answer.parser(), text) == whole
    for cut in range(len(text) + 1):
        assert parse(answer.parser(), [text[:cut], text[cut:]]) == whole


@pytest.mark.parametrize(
    ("text", "parser"), [*((text, v32) for text in MALFORMED), *((text, exp) for text in MALFORMED_EXP)]
)
@pytest.mark.parametrize("pieces", [lambda text: [text], list], ids=["whole", "by character"])
def test_a_malformed_call_is_content_to_its_last_character(
    text: str, parser: Callable[[], OutputParser], pieces: Callable[[str], list[str]]
) -> None:
    text = full(f"Sure.{text}\n")

    assert parse(parser(), pieces(text)) == [ContentText(text)]


@given(st.data())
def test_no_split_changes_what_comes_out(data: st.DataObject) -> None:
    fragments = [
        *("<think>", "</think>", "\n", " ", "a", "{", "}", '"', "<", ">", "</", '{"city": "x"}', "x=1 < 2"),
        *(f"<{mark}function_calls>" for mark in ("", "§")),
        *(f"</{mark}{kind}>" for mark in ("", "§") for kind in ("function_calls", "invoke", "parameter")),
        *(f'<{mark}invoke name="{name}">' for mark in ("", "§") for name in ("weather", "now", "f")),
        *(
            f'<{mark}parameter name="{name}"{string}>'
            for mark in ("", "§")
            for name in ("city", "days", "input")
            for string in ("", ' string="true"', ' string="false"')
        ),
        *SHORT_NAMES,
    ]
    parser = data.draw(st.sampled_from([v32, thinking, exp, plain]))
    opening = data.draw(st.sampled_from(["", '<§function_calls><§invoke name="weather">', "[calls][call]now[sep]"]))
    text = full(opening + "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=25))))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))), len(text)]

    parts = parse(parser(), [text])

    assert parse(parser(), [text[a:b] for a, b in pairwise(cuts)]) == parts
    assert parse(parser(), text) == parts
    if not calls_of(parts) and "think>" not in text:
        assert "".join(part.text for part in parts if not isinstance(part, ToolCallStart)) == text


TAG_NAMES = re.compile("think>|function_calls|invoke|｜")


@given(st.text(max_size=80).filter(lambda text: not TAG_NAMES.search(text)), st.sampled_from([v32, exp, plain]))
def test_text_without_tags_is_content_as_it_is(text: str, parser: Callable[[], OutputParser]) -> None:
    assert content_of(parse(parser(), text)) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
parameter_names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda name: name not in ("input", "arguments"))
called = st.lists(
    st.tuples(st.sampled_from(["f", "now"]), st.dictionaries(parameter_names, json_values, max_size=4)),
    min_size=1,
    max_size=3,
)


@given(called, st.text(max_size=20))
def test_what_a_model_was_shown_of_its_calls_is_read_back(
    calls: list[tuple[str, dict[str, object]]], content: str
) -> None:
    pieces = calls_block([Call(name, "", arguments) for name, arguments in calls])
    text = content + "".join(piece.name if isinstance(piece, Control) else piece for piece in pieces)

    parts = parse(v32(), text)

    assert content_of(parts) == content.rstrip()
    assert [(name, json.loads(arguments)) for name, arguments in calls_of(parts)] == calls


def test_a_string_goes_out_before_its_call_is_complete() -> None:
    parser = v32()
    parser.push(full('\n\n<§function_calls>\n<§invoke name="weather">\n<§parameter name="days" string="false">3'))
    assert parser.push(full("</§parameter>\n")) == []

    parts = parser.push(full('<§parameter name="city" string="true">San "F'))

    assert calls_of(parts) == [("weather", '{"days": 3, "city": "San \\"F')]
    assert parser.push("<") == []
    assert calls_of(parts := [*parts, *parser.push("/")]) == [("weather", '{"days": 3, "city": "San \\"F')]
    assert calls_of([*parts, *parser.push("b")]) == [("weather", '{"days": 3, "city": "San \\"F</b')]


def test_reasoning_and_content_go_out_as_they_come() -> None:
    parser = thinking()

    assert parser.push("Hm") == [ReasoningText("Hm")]
    assert parser.push("m </") == [ReasoningText("m ")]
    assert parser.push("b") == [ReasoningText("</b")]
    assert parser.push("</think>Hi") == [ContentText("Hi")]
    assert parser.push(" ") == []
    assert parser.push("you") == [ContentText(" you")]


def test_call_ids_cannot_be_guessed() -> None:
    ids = {mint_call_id() for _ in range(100)}

    assert len(ids) == 100
    assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)
