"""The engine's log-probabilities of token ids, with the tokens' text."""

from collections.abc import Sequence

from rempart_platform.generation import TextLogprob
from rempart_platform.text.tokenizer import Tokenizer
from rempart_protos.v1 import sampling_pb2


def text_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[sampling_pb2.TokenLogprob]
) -> tuple[TextLogprob, ...]:
    """One entry per token id; none at all when the engine sent none."""
    if not logprobs:
        return ()
    return tuple(
        _entry(
            tokenizer,
            token_id,
            logprob.logprob,
            tuple(
                _entry(tokenizer, top_id, top)
                for top_id, top in zip(logprob.top_token_ids, logprob.top_logprobs, strict=True)
            ),
        )
        for token_id, logprob in zip(token_ids, logprobs, strict=True)
    )


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float, top: tuple[TextLogprob, ...] = ()) -> TextLogprob:
    data = tokenizer.decode_bytes(token_id)
    return TextLogprob(data.decode("utf-8", errors="replace"), data, logprob, top)
