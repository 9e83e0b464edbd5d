from dataclasses import fields
from pathlib import Path

import pytest

from rempart_engine.config import EngineConfig


def test_every_field_is_a_flag_and_keeps_its_default() -> None:
    parsed = EngineConfig.from_args(["--model", "m.gguf"])
    assert parsed == EngineConfig(model=Path("m.gguf"))


def test_flags_are_parsed_to_the_types_of_their_fields() -> None:
    parsed = EngineConfig.from_args(
        [
            "--model",
            "m",
            "--max-model-len",
            "99",
            "--no-enable-prefix-cache",
            "--watermark",
            "0.5",
            "--dtype",
            "float32",
        ]
    )
    assert (parsed.max_model_len, parsed.enable_prefix_cache, parsed.watermark) == (99, False, 0.5)
    assert parsed.dtype == "float32"


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        EngineConfig.from_args(["--help"])
    text = capsys.readouterr().out
    assert all("--" + spec.name.replace("_", "-") in text for spec in fields(EngineConfig))
    assert all(spec.metadata["help"] for spec in fields(EngineConfig))


@pytest.mark.parametrize(
    ("asked", "num_mtp_layers", "expected"), [(None, 0, 0), (None, 1, 1), (0, 1, 0), (0, 0, 0), (3, 1, 3), (2, 4, 2)]
)
def test_a_model_that_can_draft_does_unless_told_otherwise(
    asked: int | None, num_mtp_layers: int, expected: int
) -> None:
    config = EngineConfig(model=Path("m"), num_speculative_tokens=asked)
    assert config.num_drafts_with(num_mtp_layers) == expected


def test_drafts_asked_of_a_model_that_has_none_are_refused() -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens is 2, but the model has no MTP layer"):
        EngineConfig(model=Path("m"), num_speculative_tokens=2).num_drafts_with(0)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "--model"),
        (["--model", "m", "--portt", "1"], "--portt"),
        (["--model", "m", "--max-step", "1"], "--max-step"),
        (["--model", "m", "--port", "x"], "--port"),
        (["--model", "m", "--port", "70000"], "port"),
        (["--model", "m", "--dtype", "int3"], "--dtype"),
        (["--model", "m", "--max-num-rows", "0"], "max_num_rows"),
        (["--model", "m", "--watermark", "1"], "watermark"),
        (["--model", "m", "--step-timeout-s", "nan"], "step_timeout_s"),
        (["--model", "m", "--runner", "nowhere"], "runner"),
        (["--model", "m", "--num-speculative-tokens", "4"], "num_speculative_tokens"),
        (["--model", "m", "--num-speculative-tokens", "-1"], "num_speculative_tokens"),
        (["--model", "m", "--max-speculative-rows", "0"], "max_speculative_rows"),
    ],
)
def test_a_bad_flag_is_named_and_refused_with_code_2(
    args: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        EngineConfig.from_args(args)
    assert named in capsys.readouterr().err
