"""Which endpoint has which prefix in its cache, as far as one router can tell: by what it sent there.

An estimate, never a promise. An engine may have evicted a prefix, or have more than this (its own output, what other
routers sent); a wrong estimate costs a worse choice of endpoint and nothing else.

Prefixes end at multiples of `BLOCK_TOKENS`. Each is known by one number of 64 bits: a chain over its blocks that starts
from the request's cache salt, so requests with different salts never match. The chain is Python's own hash: a quarter
of the time that blake2b takes on long prompts, and not to be foreseen, because the salt's hash has a new key in each
process.
"""

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

BLOCK_TOKENS = 64
"""As engines' KV blocks."""


def prefix_hashes(cache_salt: bytes, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """One hash for each prefix of whole blocks, the shortest first."""
    chain = hash(cache_salt)
    hashes = []
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        chain = hash((chain, token_ids[end - BLOCK_TOKENS : end]))
        hashes.append(chain)
    return tuple(hashes)


class PrefixIndex:
    """Prefixes by endpoint; of each endpoint those that were used last.

    A prefix is never forgotten before the longer ones that begin with it: whenever one is remembered, all shorter ones
    are too, and count as used after it.

    Args:
        max_prefixes: the most that are remembered of one endpoint, at most 200 bytes each.
    """

    def __init__(self, max_prefixes: int) -> None:
        self._max_prefixes = max_prefixes
        self._hashes: defaultdict[str, OrderedDict[int, None]] = defaultdict(OrderedDict)

    def num_prefixes(self, endpoint: str) -> int:
        return len(self._hashes.get(endpoint, ()))

    def num_cached_blocks(self, endpoint: str, hashes: Sequence[int]) -> int:
        """Blocks of the longest of these prefixes, each of which continues the one before, that is remembered."""
        known = self._hashes.get(endpoint)
        if not known:
            return 0
        # Where one is missing, all longer ones are.
        return bisect_left(hashes, True, key=lambda prefix: prefix not in known)

    def remember(self, endpoint: str, hashes: Sequence[int], room: int) -> None:
        """Counts these prefixes, each of which continues the one before, as cached at the endpoint and just used.

        Args:
            endpoint: where the prompt was sent.
            hashes: as `prefix_hashes` gives them.
            room: blocks that the endpoint's cache holds at all; what is beyond it is forgotten.
        """
        known = self._hashes[endpoint]
        room = min(room, self._max_prefixes)
        for prefix in reversed(hashes[:room]):
            known[prefix] = None
            known.move_to_end(prefix)
        while len(known) > room:
            known.popitem(last=False)

    def forget(self, endpoint: str) -> None:
        """The endpoint was lost: whatever comes back to its address has an empty cache."""
        self._hashes.pop(endpoint, None)
