"""The errors that stages tell apart. Everything else is a bug and fails its job."""


class DivergedError(ArithmeticError):
    """A loss or a weight is not finite: a training job stops, a defense becomes a row."""


class NotApplicableError(ValueError):
    """A defense can't work on this model or with this sample: it becomes a row with the reason."""
