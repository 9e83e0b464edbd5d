"""Pickled weights can run code when they are read, so they never are."""

from pathlib import Path

from rempart_engine.model.errors import ModelError

_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def is_pickle(path: Path) -> bool:
    """Whether a file's name says that it is a pickle."""
    return path.suffix.lower() in _SUFFIXES


def refuse_pickles(folder: Path) -> None:
    """Raises ModelError when a pickle lies directly in the folder."""
    for path in sorted(folder.iterdir()):
        if is_pickle(path):
            raise ModelError(f"{path}: pickled weights can run code; remove them, the safetensors are all that is read")
