"""Every exception that kvdrift raises on purpose, and the exit code that each one means.

    KvdriftError
    ├── UsageError          2  the call itself cannot be carried out as written
    ├── EngineUnavailable   3  the model or the engine is not to be had here
    ├── CaptureError        4  the engine ran, and its passes could not be recorded
    ├── TraceError          5  a saved trace cannot be read
    │   └── AlignmentError  5  two traces cannot be paired
    └── VerdictError        1, 6  `Audit.check`: the verdict is not a pass

`NotApplicable` is not among them: the steps of a scenario raise it, and the scenario's row says why it did not run.

A message has three parts: what is wrong (with its numbers), where, and what to do about it. Exit codes of
verdicts live in `kvdrift.vocabulary.evidence`; this module imports nothing.
"""


class KvdriftError(Exception):
    """Base of all errors that are reported to a user as one message, without a traceback."""

    exit_code: int = 1


class UsageError(KvdriftError):
    """An argument, an option or a prompt is not usable as given."""

    exit_code = 2


class EngineUnavailable(KvdriftError):
    """A model, an engine or a library that it needs cannot be had on this machine."""

    exit_code = 3


class CaptureError(KvdriftError):
    """The engine was there, and a pass failed or gave values that cannot be judged."""

    exit_code = 4


class TraceError(KvdriftError):
    """A saved run is missing, truncated, altered or of an unknown version."""

    exit_code = 5


class AlignmentError(TraceError):
    """Two values do not belong to the same address or do not have the same shape."""


class VerdictError(KvdriftError):
    """Raised by `Audit.check`: a MISMATCH, with its address and cause, or INCONCLUSIVE, with the reasons."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NotApplicable(Exception):
    """Raised by the steps of a scenario that this model, cache or prompt cannot run; the text says why."""
