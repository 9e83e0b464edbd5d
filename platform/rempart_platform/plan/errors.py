"""What planning refuses."""


class PlanError(ValueError):
    """Input that cannot be planned with; the message names the file and field, or the flag and what is known."""
