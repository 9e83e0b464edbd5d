"""What goes wrong with a model's files."""


class ModelError(ValueError):
    """The model cannot be served: what does not fit, and in which file or field. The message is for the operator."""
