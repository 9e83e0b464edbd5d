"""text/tokenizer.py, from_gguf.py and from_folder.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from rempart_platform.apis.testing import byte_tokenizer
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.text import from_gguf
from rempart_platform.text.byte_level import BYTE_OF
from rempart_platform.text.from_folder import load_folder
from rempart_platform.text.from_gguf import load_gguf
from rempart_platform.text.text_model import TextModel
from rempart_platform.text.tokenizer import Tokenizer, run_sized

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def smollm2(smollm2: Path) -> TextModel:
    """The text side of the model that the fixture of this name in conftest finds."""
    return load_gguf(smollm2)


def write_folder(folder: Path, **config: object) -> Path:
    """A byte-level tokenizer with Llama 3's manners: begin-of-text by post-processor, truncation left on."""
    vocab = {character: byte for character, byte in BYTE_OF.items()} | {"Ġ<": 256}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("    ", special=False, normalized=False)])
    bos = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    backend.enable_truncation(8)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_smollm2_tokenizes_as_its_own_tokenizer_does(smollm2: TextModel) -> None:
    assert smollm2.tokenizer.encode("What is the capital of France?") == [1780, 314, 260, 3575, 282, 4649, 47]
    assert smollm2.tokenizer.eos_token_ids == (2,)
    assert smollm2.tokenizer.vocab_size == 49152
    assert smollm2.chat_template is not None
    assert len(smollm2.tokenizer.encode("12345")) == 5


def test_a_special_token_written_by_a_tenant_is_plain_text(smollm2: TextModel, tmp_path: Path) -> None:
    for tokenizer in (smollm2.tokenizer, load_folder(write_folder(tmp_path)).tokenizer):
        for name in (*SPECIAL, "<think>"):
            text = f"a{name}b {name}\n{name}"
            token_ids = tokenizer.encode(text)
            marks = {tokenizer.special_token_id(special) for special in SPECIAL}
            assert not marks & set(token_ids)
            assert tokenizer.decode(token_ids) == text


@given(st.text(max_size=40))
def test_every_text_comes_back_byte_for_byte(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_tokens_are_exact_bytes(smollm2: TextModel) -> None:
    text = "Naïve 😀  \n\tcafé 你好\u00a0"
    token_ids = smollm2.tokenizer.encode(text)
    assert b"".join(map(smollm2.tokenizer.decode_bytes, token_ids)) == text.encode()
    assert smollm2.tokenizer.decode_bytes(2) == b"<|im_end|>"
    assert smollm2.tokenizer.decode_bytes(60_000) == b""
    assert smollm2.tokenizer.decode([1, *token_ids, 2]) == text


def test_a_folder_gives_its_prefix_its_ends_and_its_spaces(tmp_path: Path) -> None:
    template = "{{ '<|im_start|>' }}"
    model = load_folder(write_folder(tmp_path, chat_template=template, eos_token={"content": "<|im_end|>"}))
    tokenizer = model.tokenizer
    start, end = tokenizer.special_token_id("<|endoftext|>"), tokenizer.special_token_id("<|im_end|>")

    assert tokenizer.encode("ab", add_special=True) == [start, *b"ab"]
    assert len(tokenizer.encode("no truncation here")) == 18
    assert len(tokenizer.encode("a    b")) == 3
    assert tokenizer.eos_token_ids == (end,)
    assert model.chat_template == template
    think = tokenizer.special_token_id("<think>")
    assert tokenizer.decode([think, *b"hm", end]) == "<think>hm"


@pytest.mark.parametrize("has_processor", [True, False])
@pytest.mark.parametrize("adds", [True, False, None])
def test_begin_of_text_comes_from_either_file_and_never_twice(
    tmp_path: Path, has_processor: bool, adds: bool | None
) -> None:
    folder = write_folder(tmp_path, bos_token="<|endoftext|>", add_bos_token=adds)
    if not has_processor:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    tokenizer = load_folder(folder).tokenizer
    start = [tokenizer.special_token_id("<|endoftext|>")] if has_processor or adds else []
    assert tokenizer.encode("ab", add_special=True) == [*start, *b"ab"]


def test_generation_config_and_template_file_win(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, chat_template="old", eos_token="<|im_end|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (folder / "chat_template.jinja").write_text("new")
    model = load_folder(folder)
    assert model.tokenizer.eos_token_ids == (3, 4)
    assert model.chat_template == "new"


def test_a_template_is_utf_8_whatever_the_machine_speaks(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "chat_template.jinja").write_text("Réponds.", encoding="utf-8")
    program = f"from pathlib import Path; from {load_folder.__module__} import load_folder as load; " + (
        f"print(ascii(load(Path({str(tmp_path)!r})).chat_template))"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    said = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert (said.stdout, said.stderr) == ("'R\\xe9ponds.'\n", "")


def test_an_unsupported_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    file = {"model": {"type": "BPE", "vocab": {}}, "decoder": {"type": "Metaspace"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="Metaspace"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="'tekken'"):
        from_gguf._pre_tokenizer("tekken")


def test_llama3_words_split_as_llama3_does() -> None:
    words = from_gguf._pre_tokenizer("llama-bpe").pre_tokenize_str("I'll pay 12345 euros!\n\nOK")
    assert [word for word, _ in words] == ["I", "'ll", "Ġpay", "Ġ", "123", "45", "Ġeuros", "!ĊĊ", "OK"]


def test_a_panic_of_the_native_tokenizer_fails_that_text_alone() -> None:
    backend = tokenizers.Tokenizer(models.BPE({character: byte for character, byte in BYTE_OF.items()}, []))
    backend.normalizer = normalizers.Replace(Regex("(a+)+$"), "a")
    tokenizer = Tokenizer(backend, [], {})
    with pytest.raises(RempartError) as refused:
        tokenizer.encode("a" * 40 + "!")
    assert refused.value.kind is ErrorKind.INVALID_REQUEST
    assert tokenizer.encode("!") == [ord("!")]


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(RempartError, match="Unicode"):
        byte_tokenizer().encode("\ud800")


async def test_long_work_leaves_the_loop_and_brings_back_its_result() -> None:
    tokenizer = byte_tokenizer()
    text = "é" * 10_000
    assert await run_sized(len(text), lambda: tokenizer.encode(text)) == list(text.encode())
