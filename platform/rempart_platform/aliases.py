"""Names that stand for models: for one, or for several by weight, as while a new version is tried on few requests.

chat=deepseek-v3.2                              another name
chat=deepseek-v3.2:95,deepseek-v3.2-next:5      a canary: of 100 sessions, 5 meet the new model

Behind validation nobody knows them: limits, prices, metrics, logs and answers name the model that was met.
"""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """A model's part of an alias."""

    model: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Alias:
    """A name and the models that it stands for."""

    name: str
    shares: tuple[Share, ...]

    @property
    def heaviest(self) -> str:
        """The model that most sessions meet; the first of these."""
        return max(self.shares, key=lambda share: share.weight).model

    def choose(self, session: str) -> str:
        """The model for a session: always the same one while the weights stay.

        Where weights change, only sessions in the difference move.
        """
        digest = hashlib.sha256(f"{self.name}\0{session}".encode()).digest()
        position = int.from_bytes(digest[:8]) * sum(share.weight for share in self.shares) >> 64
        for share in self.shares:
            if position < share.weight:
                break
            position -= share.weight
        return share.model


def means_models(alias: str) -> str:
    """Why an alias can have neither limits nor prices: a request counts for, and costs, what its model does."""
    return f"{alias!r} is an alias; limits and prices are of the models that it stands for"


def parse_alias(text: str) -> Alias:
    """Reads NAME=MODEL or NAME=MODEL:WEIGHT,MODEL:WEIGHT.

    A model's own name may hold colons: what follows the last is a weight only when it is a number.

    Raises:
        ValueError: it is malformed, names a model twice, or all weights are 0.
    """
    name, _, listed = text.partition("=")
    shares = tuple(_share(part.strip()) for part in listed.split(","))
    models = [share.model for share in shares]
    if not name or not all(models):
        raise ValueError(f"{text!r} is not NAME=MODEL or NAME=MODEL:WEIGHT,MODEL:WEIGHT")
    if len(set(models)) < len(models):
        raise ValueError(f"{text!r} names a model twice")
    if not any(share.weight for share in shares):
        raise ValueError(f"{text!r} gives no model a weight above 0")
    return Alias(name, shares)


def _share(text: str) -> Share:
    model, _, weight = text.rpartition(":")
    return Share(model, int(weight)) if model and weight.isdecimal() else Share(text)
