"""A tokenizer from a Hugging Face folder: tokenizer.json and the small files beside it."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer as Backend

from rempart_platform.text.byte_level import token_to_bytes
from rempart_platform.text.text_model import TextModel
from rempart_platform.text.tokenizer import Tokenizer

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _BpeModel(msgspec.Struct):
    type: str
    vocab: dict[str, int]


class _Decoder(msgspec.Struct):
    type: str


class _TokenizerFile(msgspec.Struct):
    model: _BpeModel
    decoder: _Decoder | None = None
    added_tokens: list[_AddedToken] = []


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _AddedTokenName(msgspec.Struct):
    content: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None
    eos_token: str | _AddedTokenName | None = None
    bos_token: str | _AddedTokenName | None = None
    add_bos_token: bool | None = None


class _ModelConfig(msgspec.Struct):
    architectures: list[str] = []


class _EosConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def load_folder(folder: Path) -> TextModel:
    """Tokenizer, chat template and architecture of a folder. Raises ValueError naming what is not supported."""
    data = (folder / "tokenizer.json").read_bytes()
    file = msgspec.json.decode(data, type=_TokenizerFile)
    if file.model.type != "BPE" or file.decoder is None or file.decoder.type != "ByteLevel":
        decoder = file.decoder.type if file.decoder else None
        raise ValueError(f"tokenizer.json: model {file.model.type!r} with decoder {decoder!r} is not supported")
    # Whitespace is text, even when the vocabulary lists a run of it as an added token.
    special = {token.content: token.id for token in file.added_tokens if not token.content.isspace()}
    config = _read(folder / "tokenizer_config.json", _TokenizerConfig)
    tokenizer = Tokenizer(
        _plain_backend(data, special),
        _token_bytes(file),
        special,
        visible_token_ids=[token.id for token in file.added_tokens if not token.special],
        prefix_token_ids=_prefix(Backend.from_str(data.decode()), config, special),
        eos_token_ids=_eos(folder, config, special),
    )
    architectures = _read(folder / "config.json", _ModelConfig).architectures
    return TextModel(tokenizer, _chat_template(folder, config), next(iter(architectures), None))


def _plain_backend(data: bytes, special: dict[str, int]) -> Backend:
    """The tokenizer without its special tokens: they are neither found in text nor reachable by merges."""
    content: dict[str, Any] = msgspec.json.decode(data)
    model = content["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in special}
    model["unk_token"] = None
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if token["content"] not in special]
    content.update(post_processor=None, truncation=None, padding=None)
    return Backend.from_str(msgspec.json.encode(content).decode())


def _prefix(backend: Backend, config: _TokenizerConfig, special: dict[str, int]) -> tuple[int, ...]:
    """What tokenizer.json puts before a text; begin-of-text also when tokenizer_config.json alone asks for it."""
    prefix = tuple(backend.encode("").ids)
    bos = _named(config.bos_token, special) if config.add_bos_token else ()
    return prefix if prefix[: len(bos)] == bos else bos + prefix


def _token_bytes(file: _TokenizerFile) -> list[bytes]:
    texts = {token_id: token_to_bytes(token) for token, token_id in file.model.vocab.items()}
    texts |= {token.id: token.content.encode() for token in file.added_tokens}
    return [texts.get(token_id, b"") for token_id in range(max(texts) + 1)]


def _eos(folder: Path, config: _TokenizerConfig, special: dict[str, int]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        match _read(folder / name, _EosConfig).eos_token_id:
            case int(token_id):
                return (token_id,)
            case list(token_ids):
                return tuple(token_ids)
            case None:
                continue
    return _named(config.eos_token, special)


def _named(token: str | _AddedTokenName | None, special: dict[str, int]) -> tuple[int, ...]:
    """Id of a special token, if there is one."""
    name = token.content if isinstance(token, _AddedTokenName) else token
    return (special[name],) if name in special else ()


def _chat_template(folder: Path, config: _TokenizerConfig) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    if isinstance(config.chat_template, list):
        named = {template.name: template.template for template in config.chat_template}
        return named.get("default")
    return config.chat_template


def _read(path: Path, kind: type[_Struct]) -> _Struct:
    return msgspec.json.decode(path.read_bytes() if path.is_file() else b"{}", type=kind)
