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
    ],
)
def test_a_bad_flag_is_named_and_refused_with_code_2(
    args: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        EngineConfig.from_args(args)
    assert named in capsys.readouterr().err
