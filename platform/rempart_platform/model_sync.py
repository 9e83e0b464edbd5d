"""Keeps the catalog in step with what the engines say of their models."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rempart_platform.aliases import Alias
from rempart_platform.config import ModelSource
from rempart_platform.endpoints.load import EndpointState
from rempart_platform.models import ModelCatalog, ServedModel, load_served_model

_logger = logging.getLogger(__name__)

# Until an engine says how long its contexts are nothing runs, so this bounds nothing but what waits for a first engine.
_UNKNOWN_MAX_MODEL_LEN = 1 << 20


def load_catalog(sources: Iterable[ModelSource], created_s: int, aliases: Iterable[Alias] = ()) -> ModelCatalog:
    """The text side of every model; touches no weights.

    Raises:
        OSError, ValueError: a model's tokenizer cannot be read.
    """
    models = (
        load_served_model(
            source.path,
            name=source.name,
            max_model_len=source.max_model_len or _UNKNOWN_MAX_MODEL_LEN,
            created_s=created_s,
            chat_format=source.chat_format,
        )
        for source in sources
    )
    return ModelCatalog(models, aliases)


def sync_model(catalog: ModelCatalog, changed: EndpointState, states: Sequence[EndpointState]) -> None:
    """Takes over what a changed endpoint says of its model.

    Of engines of one model with different limits the least counts, so that any of them can take any request.
    """
    if changed.model is None:
        return
    known = {model.name: model for model in catalog.all()}
    model = known.get(changed.model.name)
    if model is None:
        _logger.warning(
            "an engine serves a model that is not configured",
            extra={"endpoint": changed.address, "model": changed.model.name, "configured": sorted(known)},
        )
        return
    catalog.put(_with_limits(model, states))


def _with_limits(model: ServedModel, states: Sequence[EndpointState]) -> ServedModel:
    serving = [state.model for state in states if state.model is not None and state.model.name == model.name]
    if not serving:  # the last one is gone: what it said stands until the next one says otherwise
        return model
    return replace(
        model,
        max_model_len=min(served.max_model_len for served in serving),
        vocab_size=min(served.vocab_size for served in serving),
        eos_token_ids=serving[0].eos_token_ids or model.eos_token_ids,
    )
