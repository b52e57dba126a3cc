"""Every error hpcq raises on purpose, in one tree.

An error says what failed, where (host, batch job, file) and what to do about it, in one line fit for standard
error. ``exit_status`` is what the command line exits with when the error ends it (see the README's table).
Nothing here imports another module of hpcq.
"""

from __future__ import annotations

import errno


class HpcqError(Exception):
    """Base of every error of hpcq."""

    exit_status = 1


class UsageError(HpcqError, ValueError):
    """A value or option of the user's that cannot be used; names it."""

    exit_status = 2


class StateError(HpcqError, OSError):
    """A file of the state directory that cannot be written; names it. Takes errno, the system's words, the path."""

    def __str__(self) -> str:
        full = self.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; make room, or set HPCQ_STATE_DIR to another place" if full else ""
        return f"cannot write {self.filename}: {self.strerror}{advice}"


class TemplateError(UsageError):
    """A batch template that cannot be rendered; names the template, the line and the variable."""


class BatchError(HpcqError):
    """The batch system refused, is missing, or did not answer in time; carries its own message."""

    exit_status = 3


class QueueNotFoundError(HpcqError):
    """No queue of that name, or its manager does not answer."""

    exit_status = 4


class ConnectionFileError(QueueNotFoundError):
    """A connection file that is unreadable, malformed, or readable by others."""


class AuthenticationError(QueueNotFoundError):
    """The other side's key is not the one in the connection file; trying again is useless."""


class ProtocolError(HpcqError):
    """The other side sent bytes that are not our protocol, or a message too large."""


class QueueClosedError(HpcqError):
    """The queue was closed; nothing can be submitted or waited for."""


class PilotFailedError(HpcqError):
    """A pilot cannot serve; names it, its host, the layer that failed and what to do."""


class SerializationError(HpcqError, TypeError):
    """A function, argument or result that cannot be pickled; names the part."""


class RemoteError(HpcqError):
    """Stands for an exception raised on a pilot whose own type cannot be rebuilt here; holds its text."""


class RemoteTraceback(HpcqError):  # noqa: N818 - shown to users as the cause, not caught
    """The traceback of an exception as it was on the pilot; set as that exception's ``__cause__``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return "\n" + self.text

    def __reduce__(self) -> tuple[type[RemoteTraceback], tuple[str]]:
        return (RemoteTraceback, (self.text,))


class TaskFailedError(HpcqError):
    """Raised by ``Task.result()`` for an outcome that carries no exception of the user's own."""
