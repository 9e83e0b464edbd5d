"""chat/deepseek_v32.py and chat/deepseek_exp.py against prompts that were written out by hand, in chat_goldens/.

There, short names stand for DeepSeek's control tokens, and @TOOLS@ for the block that describes a case's tools.
"""

from pathlib import Path

import msgspec
import pytest
import tokenizers

from rempart_platform.chat.format import ChatFormat, find_chat_format
from rempart_platform.chat.message import Conversation, Message, ResponseSchema, Role, Tool, ToolCall
from rempart_platform.text.from_folder import load_folder
from rempart_platform.text.text_model import TextModel

FOLDER = Path(__file__).parent / "chat_goldens"
FULL_NAMES = {
    "<BOS>": "<｜begin▁of▁sentence｜>",
    "<EOS>": "<｜end▁of▁sentence｜>",
    "<User>": "<｜User｜>",
    "<Assistant>": "<｜Assistant｜>",
    "§": "｜DSML｜",
    "<calls>": "<｜tool▁calls▁begin｜>",
    "</calls>": "<｜tool▁calls▁end｜>",
    "<call>": "<｜tool▁call▁begin｜>",
    "</call>": "<｜tool▁call▁end｜>",
    "<sep>": "<｜tool▁sep｜>",
    "<output>": "<｜tool▁output▁begin｜>",
    "</output>": "<｜tool▁output▁end｜>",
}


class GoldenMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


class Golden(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    messages: list[GoldenMessage]
    text: list[str]
    format: str = "deepseek_v32"
    thinking: bool | None = None
    tools: list[str] = []
    schema: str | None = None


class GoldenTool(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str
    parameters: str
    v32: str
    """How V3.2 is told of it."""
    exp: str
    is_strict: bool = False


GOLDENS = msgspec.json.decode((FOLDER / "deepseek_v32.json").read_bytes(), type=list[Golden])
TOOLS = msgspec.json.decode((FOLDER / "tools.json").read_bytes(), type=dict[str, GoldenTool])


@pytest.fixture(scope="module")
def model(deepseek_tokenizer: Path) -> TextModel:
    return load_folder(deepseek_tokenizer)


@pytest.fixture(scope="module")
def reference(deepseek_tokenizer: Path) -> tokenizers.Tokenizer:
    """The tokenizer as it is published: it finds control tokens in text."""
    return tokenizers.Tokenizer.from_file(str(deepseek_tokenizer / "tokenizer.json"))


def named(model: TextModel, name: str) -> ChatFormat:
    chat_format = find_chat_format(model, chosen=name)
    assert chat_format is not None
    return chat_format


def conversation_of(golden: Golden) -> Conversation:
    tools = (TOOLS[name] for name in golden.tools)
    return Conversation(
        tuple(
            Message(message.role, message.content, message.reasoning, message.tool_calls, message.tool_call_id)
            for message in golden.messages
        ),
        tools=tuple(Tool(tool.name, tool.description, tool.parameters, tool.is_strict) for tool in tools),
        thinking=golden.thinking,
        response_schema=None if golden.schema is None else ResponseSchema(golden.schema),
    )


def text_of(golden: Golden) -> str:
    text = "".join(golden.text).replace("@TOOLS@", tools_block(golden))
    for short, full in FULL_NAMES.items():
        text = text.replace(short, full)
    return text


def tools_block(golden: Golden) -> str:
    tools = [TOOLS[name] for name in golden.tools]
    if golden.format == "deepseek_v32_exp":
        block = (FOLDER / "exp_tools.txt").read_text().removesuffix("\n")
        return block.replace("@FUNCTIONS@", "\n".join(tool.exp for tool in tools))
    return (FOLDER / "v32_tools.txt").read_text().replace("@FUNCTIONS@", "\n".join(tool.v32 for tool in tools))


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_a_conversation_is_rendered_as_the_model_was_trained(
    golden: Golden, model: TextModel, reference: tokenizers.Tokenizer
) -> None:
    token_ids = named(model, golden.format).render(conversation_of(golden))

    assert reference.decode(token_ids, skip_special_tokens=False) == text_of(golden)
    assert token_ids == reference.encode(text_of(golden), add_special_tokens=False).ids


def test_the_model_cards_tokens(model: TextModel) -> None:
    assert named(model, "deepseek_v32").render(conversation_of(GOLDENS[0])) == [
        *(0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16, 1),
        *(128803, 19, 13, 19, 127252, 128804, 128798),
    ]


def test_there_are_enough_goldens() -> None:
    assert len(GOLDENS) >= 60
    assert len({golden.name for golden in GOLDENS}) == len(GOLDENS)
