"""The models that this router serves, as its front ends see them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rempart_platform.aliases import Alias
from rempart_platform.chat.format import ChatFormat, find_chat_format
from rempart_platform.errors import ErrorKind, RempartError
from rempart_platform.text.from_folder import load_folder
from rempart_platform.text.from_gguf import load_gguf
from rempart_platform.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model. `chat_format` is None when the model has none that we know: it completes text, and does not chat."""

    name: str
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    created_s: int


class ModelCatalog:
    """Served models by name.

    Args:
        models: all of them.
        aliases: other names; they stand for models that are served.
    """

    def __init__(self, models: Iterable[ServedModel], aliases: Iterable[Alias] = ()) -> None:
        self._models = {model.name: model for model in models}
        self._aliases = {alias.name: alias for alias in aliases}

    def get(self, name: str, session: str | None = None) -> ServedModel:
        """The model of that name; of an alias, the one that this session meets, or most sessions if none is named.

        Raises:
            RempartError: MODEL_NOT_FOUND.
        """
        alias = self._aliases.get(name)
        if alias is not None:
            name = alias.heaviest if session is None else alias.choose(session)
        try:
            return self._models[name]
        except KeyError:
            message = f"The model `{name[:100]}` does not exist or you do not have access to it."
            raise RempartError(ErrorKind.MODEL_NOT_FOUND, message, param="model") from None

    def has(self, name: str) -> bool:
        """Whether `get` finds it."""
        return name in self._models or name in self._aliases

    def put(self, model: ServedModel) -> None:
        """Serves the model from now on, instead of one of the same name."""
        self._models[model.name] = model

    def all(self) -> list[ServedModel]:
        """In order of name, without aliases."""
        return [self._models[name] for name in sorted(self._models)]

    def shown(self, name: str) -> ServedModel:
        """As `listed` has it. Raises RempartError MODEL_NOT_FOUND."""
        alias = self._aliases.get(name)
        return self.get(name) if alias is None else self._as_model(alias)

    def listed(self) -> list[ServedModel]:
        """In order of name, with aliases as models of that name: what of their models holds for every session."""
        aliases = (self._as_model(alias) for alias in self._aliases.values())
        return sorted((*self._models.values(), *aliases), key=lambda model: model.name)

    def _as_model(self, alias: Alias) -> ServedModel:
        models = [self._models[share.model] for share in alias.shares]
        return replace(models[0], name=alias.name, max_model_len=min(model.max_model_len for model in models))


def load_served_model(
    path: Path,
    *,
    name: str,
    max_model_len: int,
    created_s: int,
    vocab_size: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    chat_format: str | None = None,
) -> ServedModel:
    """Reads the text side of a model from a GGUF file or a Hugging Face folder; touches no weights.

    Args:
        path: the file or folder.
        name: to serve it under.
        max_model_len: most tokens of prompt and output together, as the engine serves it.
        created_s: seconds since the epoch.
        vocab_size: number of the engine's token ids; the tokenizer's when None.
        eos_token_ids: the engine's; the tokenizer's when empty.
        chat_format: name of the format to speak; the one that the model shows, when None.

    Raises:
        OSError, ValueError: the tokenizer cannot be read, or has not what the chat format needs.
    """
    text = load_folder(path) if path.is_dir() else load_gguf(path)
    spoken = find_chat_format(text, (path.resolve().name, name), chat_format)
    return ServedModel(
        name=name,
        tokenizer=text.tokenizer if spoken is None else text.tokenizer.showing(spoken.control_tokens),
        chat_format=spoken,
        max_model_len=max_model_len,
        vocab_size=vocab_size or text.tokenizer.vocab_size,
        eos_token_ids=eos_token_ids or text.tokenizer.eos_token_ids,
        created_s=created_s,
    )
