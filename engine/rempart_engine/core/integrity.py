"""How broken bookkeeping makes itself known."""


class IntegrityError(Exception):
    """Bookkeeping contradicts itself: a bug of ours, never a caller's fault."""
