"""Fakes of the platform's own parts, for tests and benches of what stands on them."""

import tokenizers

from rempart_platform.errors import ErrorKind, QuotaViolation, RempartError
from rempart_platform.generation import Usage
from rempart_platform.models import ServedModel
from rempart_platform.tenancy.reservation import Reservation
from rempart_platform.text.tokenizer import Tokenizer

FIRST_BYTE_TOKEN = 1
"""Token id of byte 0 in the fake vocabulary; id 0 is the end of sequence."""


def fake_served_model(name: str = "fake", vocab_size: int = 512, max_model_len: int = 4096) -> ServedModel:
    """A model whose tokens are single bytes: 0 ends a sequence, ids 1 to 256 are the bytes, the rest are letters."""
    letters = [b"abcdefghijklmnopqrstuvwxyz"[index % 26 : index % 26 + 1] for index in range(vocab_size - 257)]
    token_bytes = [b"<end>", *(bytes([byte]) for byte in range(256)), *letters]
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), token_bytes, {"<end>": 0}, eos_token_ids=(0,))
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        chat_format=None,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=(0,),
        created_s=0,
    )


def byte_token_ids(text: str) -> list[int]:
    """The fake model's token ids of a text."""
    return [FIRST_BYTE_TOKEN + byte for byte in text.encode()]


class RecordingLedger:
    """Quotas in memory: admits up to `max_open` reservations and remembers how each ended."""

    def __init__(self, max_open: int | None = None) -> None:
        self.max_open = max_open
        self.open: dict[str, Reservation] = {}
        self.usages: dict[str, Usage] = {}
        self.tenants: dict[str, tuple[str, str]] = {}
        """And keys, of all that were admitted."""
        self.refunded_ids: list[str] = []

    async def reserve(
        self, tenant: str, request_id: str, tokens: int, *, model: str = "", key_id: str = "", prompt_tokens: int = 0
    ) -> Reservation:
        if self.max_open is not None and len(self.open) >= self.max_open:
            raise RempartError(
                ErrorKind.RATE_LIMIT_EXCEEDED,
                f"The limit of {self.max_open} requests at the same time is reached.",
                retry_after_s=1.0,
                violation=QuotaViolation(tenant, "concurrency", self.max_open),
            )
        self.tenants[request_id] = (tenant, key_id)
        self.open[request_id] = Reservation(request_id, tenant, tokens, {"x-ratelimit-limit-requests": "1"})
        return self.open[request_id]

    async def settle(self, reservation: Reservation, usage: Usage, model: str) -> None:
        del self.open[reservation.reservation_id]
        self.usages[reservation.reservation_id] = usage

    async def refund(self, reservation: Reservation) -> None:
        del self.open[reservation.reservation_id]
        self.refunded_ids.append(reservation.reservation_id)
