"""The errors that stages tell apart. Everything else is a bug and fails its job."""


class DivergedError(ArithmeticError):
    """A loss or a weight is not finite: a training job stops, a defense becomes a row."""


class NotApplicableError(ValueError):
    """A defense can't work on this model or with this sample: it becomes a row with the reason."""


class StoppedError(BaseException):
    """The job was told to stop by a signal: no error of its own, so that nothing takes it for a result."""
