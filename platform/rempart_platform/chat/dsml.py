"""DSML: how DeepSeek-V3.2 is told of tools, calls them, and reads their results.

The texts are those that the model was trained with; not a character of them is ours to change.
"""

from collections.abc import Iterable, Sequence

from rempart_platform.chat.deepseek_tags import END_THINK, THINK
from rempart_platform.chat.json_text import read_json, write_json
from rempart_platform.chat.message import ResponseSchema, Tool
from rempart_platform.chat.prompt import Control, Piece, fill
from rempart_platform.chat.turns import Call, ToolResults
from rempart_platform.errors import invalid_request

DSML = Control("｜DSML｜")
"""The mark inside of its tags; no special token in the tokenizers of the V3 series."""

_TOOLS = """## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml}function_calls>" block like the following as part of your reply to the \
user:
<{dsml}function_calls>
<{dsml}invoke name="$FUNCTION_NAME">
<{dsml}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}parameter>
...
</{dsml}invoke>
<{dsml}invoke name="$FUNCTION_NAME2">
...
</{dsml}invoke>
</{dsml}function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other \
types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking \
block. Here is an example:
<{dsml}function_calls>
...
</{dsml}function_calls>
<function_results>
...
</function_results>
{think}...thinking about results{end_think}
Here are the functions available in JSONSchema format:
<functions>
{functions}
</functions>
"""
_CALLS = "\n\n<{dsml}function_calls>\n"
_END_CALLS = "</{dsml}function_calls>"
_INVOKE = '<{dsml}invoke name="{name}">\n'
_END_INVOKE = "\n</{dsml}invoke>\n"
_PARAMETER = '<{dsml}parameter name="{name}" string="{is_string}">{value}</{dsml}parameter>'
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
_ANY_OBJECT = '{"type": "object"}'


def tools_block(tools: Iterable[Tool]) -> list[Piece]:
    """What tells the model of its tools. Raises RempartError INVALID_REQUEST for parameters that are no JSON."""
    functions = "\n".join(function_json(tool, position) for position, tool in enumerate(tools))
    return fill(_TOOLS, dsml=DSML, think=THINK, end_think=END_THINK, functions=functions)


def function_json(tool: Tool, position: int) -> str:
    """A tool in the words of OpenAI's `function`. `position` in the request's tools is for the error."""
    function: dict[str, object] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = parameters_of(tool, position)
    if tool.is_strict:
        function["strict"] = True
    return write_json(function)


def parameters_of(tool: Tool, position: int) -> object:
    """The tool's schema. Raises RempartError INVALID_REQUEST when it is no JSON."""
    return _schema(tool.parameters, f"tools[{position}].parameters")


def response_block(wanted: ResponseSchema) -> str:
    """What tells the model how its answer must look. Raises RempartError INVALID_REQUEST for a schema of no JSON."""
    return _RESPONSE_FORMAT + write_json(_schema(wanted.schema or _ANY_OBJECT, "response_format"))


def calls_block(calls: Sequence[Call]) -> list[Piece]:
    """The calls of one answer; nothing when it has none."""
    if not calls:
        return []
    invokes = [piece for call in calls for piece in _invoke(call)]
    return [*fill(_CALLS, dsml=DSML), *invokes, *fill(_END_CALLS, dsml=DSML)]


def results_block(results: ToolResults) -> str:
    """The results, up to where the next answer begins."""
    contents = "".join(f"\n<result>{content}</result>" for content in results.contents)
    return f"\n\n<function_results>{contents}\n</function_results>\n\n"


def _invoke(call: Call) -> list[Piece]:
    pieces = fill(_INVOKE, dsml=DSML, name=call.name)
    for position, (name, value) in enumerate(call.arguments.items()):
        is_string = isinstance(value, str)
        text = value if isinstance(value, str) else write_json(value)
        separator = "\n" if position else ""
        flag = "true" if is_string else "false"
        pieces += [separator, *fill(_PARAMETER, dsml=DSML, name=name, is_string=flag, value=text)]
    return pieces + fill(_END_INVOKE, dsml=DSML)


def _schema(text: str, param: str) -> object:
    try:
        return read_json(text)
    except ValueError:
        raise invalid_request(f"'{param}' must be a JSON schema.", param) from None
