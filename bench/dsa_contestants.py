"""The ways to do one layer's attention for new tokens: dense and sparse through block tables, and in plain torch."""

import torch
from bench.dsa_caches import SCALE, Caches, NewTokens, slots_of
from bench.dsa_points import V32

from rempart_engine.kernels.index_cache import read_index_keys, store_index_keys
from rempart_engine.kernels.latent_attention import latent_attention
from rempart_engine.kernels.latent_cache import read_latents
from rempart_engine.kernels.select_tokens import Selection, select_tokens
from rempart_engine.model.deepseek.options import AttentionOptions

_SCORE_BYTES = AttentionOptions().score_bytes


def attend(caches: Caches, new: NewTokens, selection: Selection) -> torch.Tensor:  # [T, H, R]
    """Attention to what was chosen."""
    return latent_attention(new.latent_queries, new.rope_queries, caches.latents, new.step, selection, SCALE)


def choose(caches: Caches, new: NewTokens) -> Selection:
    """What a layer's indexer does once it has projected: keys are stored always, scores computed where they matter."""
    store_index_keys(new.index_keys, new.step.slots, caches.index_keys)
    if int(new.step.positions.max()) < V32.indexer.top_k:
        return Selection.of_everything(new.step)
    return select_tokens(
        new.index_queries, new.index_weights, caches.index_keys, new.step, V32.indexer.top_k, _SCORE_BYTES
    )


def dense(caches: Caches, new: NewTokens) -> torch.Tensor:  # [T, H, R]
    """A layer without an indexer."""
    return attend(caches, new, Selection.of_everything(new.step))


def sparse(caches: Caches, new: NewTokens) -> torch.Tensor:  # [T, H, R]
    """A layer with one."""
    return attend(caches, new, choose(caches, new))


class TorchSketch:
    """One query in a few lines of torch, over records that lie in order: what anybody would write first."""

    def __init__(self, caches: Caches, new: NewTokens) -> None:
        slots = slots_of(new.step, 0)
        self._records = torch.cat(read_latents(caches.latents, slots, V32.kv_lora_rank), 1).to(caches.dtype)  # [S, R+P]
        self._keys = read_index_keys(caches.index_keys, slots, V32.indexer.head_dim).to(caches.dtype)  # [S, D]
        self._queries = torch.cat((new.latent_queries[0], new.rope_queries[0]), 1)  # [H, R + P]
        self._index_queries, self._index_weights = new.index_queries[0], new.index_weights[0]

    def choose(self) -> torch.Tensor:  # [K], in no order
        scores = self._index_weights @ torch.relu(self._index_queries @ self._keys.T).float()
        return scores.topk(min(V32.indexer.top_k, len(scores)), sorted=False).indices

    def attend(self, positions: torch.Tensor | None) -> torch.Tensor:  # [H, R]
        """To these positions [K], or to everything."""
        records = self._records if positions is None else self._records[positions]
        weights = ((self._queries @ records.T).float() * SCALE).softmax(-1).to(records.dtype)
        return weights @ records[:, : V32.kv_lora_rank]

    def dense(self) -> torch.Tensor:  # [H, R]
        return self.attend(None)

    def sparse(self) -> torch.Tensor:  # [H, R]
        return self.attend(self.choose())
