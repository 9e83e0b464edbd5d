"""How long to wait before one more attempt."""

import random


def jittered_backoff_s(attempt: int, initial_s: float, max_s: float, rng: random.Random) -> float:
    """Seconds before attempt `attempt` (from 0): doubled up to a most, half of it drawn so that many spread."""
    full = min(max_s, initial_s * 2.0 ** min(attempt, 32))
    return full * rng.uniform(0.5, 1.0)
