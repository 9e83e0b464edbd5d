"""Finds a model: a published shape by its name, or a Hugging Face config."""

from pathlib import Path

from rempart_platform.plan.errors import PlanError
from rempart_platform.plan.fields import Fields, read_json, read_toml
from rempart_platform.plan.shapes import ModelShape, shape_from_config

PUBLISHED_FILE = Path(__file__).parent / "models.toml"


def find_model(name_or_path: str) -> ModelShape:
    """A published shape; else the config.json of that folder, or that file.

    Raises:
        PlanError: there is no such thing (the message lists the published names), or a field of it does not fit.
    """
    published = _published()
    if name_or_path.lower() in published:
        return shape_from_config(published[name_or_path.lower()], name_or_path.lower())
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PlanError(f"{path}: has no config.json")
        return shape_from_config(read_json(path / "config.json"), path.resolve().name)
    if path.is_file():
        return shape_from_config(read_json(path), path.resolve().parent.name)
    raise PlanError(
        f"MODEL {name_or_path!r} is neither a folder, nor a file, nor a known name; known: {', '.join(published)}"
    )


def published_names() -> tuple[str, ...]:
    return tuple(_published())


def _published() -> dict[str, Fields]:
    """Configs by name; the names under `also` share theirs."""
    configs: dict[str, Fields] = {}
    for name, model in read_toml(PUBLISHED_FILE).section("models").sections().items():
        configs[name] = model.section("config")
        configs |= dict.fromkeys(model.texts("also"), configs[name])
    return configs
