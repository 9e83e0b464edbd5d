"""A tokenizer from the metadata of a GGUF file."""

from enum import IntEnum
from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rempart_platform.text.byte_level import token_to_bytes
from rempart_platform.text.text_model import TextModel
from rempart_platform.text.tokenizer import Tokenizer

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _TokenType(IntEnum):
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


class _Metadata:
    """Typed reading of the file's key-value fields."""

    def __init__(self, path: Path) -> None:
        self._fields = gguf.GGUFReader(path).fields

    def strings(self, key: str) -> list[str]:
        contents = self._required(key)
        if not isinstance(contents, list):
            raise ValueError(f"GGUF field {key} is not a list")
        return [str(item) for item in contents]

    def integers(self, key: str) -> list[int]:
        return [int(item) for item in self.strings(key)]

    def string(self, key: str) -> str:
        return str(self._required(key))

    def optional_string(self, key: str) -> str | None:
        return self.string(key) if key in self._fields else None

    def optional_integer(self, key: str) -> int | None:
        return int(self.string(key)) if key in self._fields else None

    def flag(self, key: str) -> bool:
        return key in self._fields and bool(self._fields[key].contents())

    def _required(self, key: str) -> object:
        if key not in self._fields:
            raise ValueError(f"GGUF file has no field {key}")
        contents: object = self._fields[key].contents()
        return contents


def load_gguf(path: Path) -> TextModel:
    """Tokenizer and chat template of a GGUF file. Raises ValueError naming what is not supported."""
    metadata = _Metadata(path)
    model = metadata.string("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(f"GGUF tokenizer model {model!r} is not supported (supported: 'gpt2')")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    types = metadata.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise ValueError(f"GGUF file has {len(tokens)} tokens and {len(types)} token types")
    tokenizer = Tokenizer(
        _build_backend(metadata, tokens, types),
        [
            token_to_bytes(token) if kind < _TokenType.UNKNOWN else token.encode()
            for token, kind in zip(tokens, types, strict=True)
        ],
        {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind >= _TokenType.UNKNOWN and not token.isspace()
        },
        visible_token_ids=[i for i, kind in enumerate(types) if kind == _TokenType.USER_DEFINED],
        prefix_token_ids=_prefix(metadata),
        eos_token_ids=_eos(metadata),
    )
    return TextModel(tokenizer, metadata.optional_string("tokenizer.chat_template"))


def _build_backend(metadata: _Metadata, tokens: list[str], types: list[int]) -> Backend:
    pre = metadata.optional_string("tokenizer.ggml.pre") or "default"
    vocab = {token: i for i, token in enumerate(tokens) if types[i] < _TokenType.UNKNOWN or token.isspace()}
    merges = [_split_merge(merge) for merge in metadata.strings("tokenizer.ggml.merges")]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    # Runs of spaces that the model knows as one token are text; every other user-defined token is a mark.
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _TokenType.USER_DEFINED and token.isspace()
        ]
    )
    return backend


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    match name:
        case "gpt2" | "gpt-2" | "default":
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        case "smollm":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        case "llama-bpe":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        case _:
            raise ValueError(f"GGUF pre-tokenizer {name!r} is not supported")


def _prefix(metadata: _Metadata) -> tuple[int, ...]:
    bos = metadata.optional_integer("tokenizer.ggml.bos_token_id")
    return (bos,) if bos is not None and metadata.flag("tokenizer.ggml.add_bos_token") else ()


def _eos(metadata: _Metadata) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = (metadata.optional_integer(key) for key in keys)
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
