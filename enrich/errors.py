"""All exceptions, grouped by what the caller does about them, and hints for a missing extra and a misspelled name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from enrich.exit_codes import ExitCode


class EnrichError(Exception):
    """An error shown to the user: what is wrong and where (`message`), and what to do (`hint`, or None)."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class JobError(EnrichError):
    """The command or the job file is wrong: fix it."""

    exit_code = ExitCode.USAGE


class WorkspaceMismatch(JobError):
    """The key belongs to a different workspace than the ledger, or the workspace was renamed."""


class ApiKeyRejected(EnrichError):
    """There is no usable API key, or the API rejects it: fix the key."""

    exit_code = ExitCode.KEY


class ApiUnreachable(EnrichError):
    """The API does not respond. The next run resumes."""

    exit_code = ExitCode.API


class ClusterFailed(EnrichError):
    """The machines of the cluster cannot be reached or started. The next run resumes."""

    exit_code = ExitCode.API


class CommandRefused(EnrichError):
    """Nothing was spent: check the input, the balance, the ledger."""

    exit_code = ExitCode.REFUSED


class RunDeclined(CommandRefused):
    """The run needs a confirmation, and there is no terminal for it. No record of the run is kept."""


class RunCancelled(RunDeclined):
    """The user answered no."""

    def __init__(self) -> None:
        super().__init__("Cancelled. Nothing sent.")


class LedgerDamaged(CommandRefused):
    """The ledger's file is damaged: its content is not what was written."""


#: Hint for a file that cannot be written.
UNWRITABLE_HINT = "choose another file, or change the permissions of its folder"

#: Hint for a file that cannot be read.
UNREADABLE_HINT = "check that it is a file, and that this user may read it"

#: Why a run that cannot reach the API writes no output from the ledger.
NOTHING_SENT = "no run of this ledger has sent a request"

#: Hint for LedgerLocked.
LOCKED_HINT = "`enrich status JOB --watch` shows it"


class LedgerLocked(EnrichError):
    """Another run is in progress."""

    exit_code = ExitCode.LOCKED


class CanaryStopped(EnrichError):
    """The first answers look wrong. The remaining requests were not sent."""

    exit_code = ExitCode.CANARY


class LedgerFailed(EnrichError):
    """The ledger could not be written during a run. Nothing more is sent."""


class LedgerMoved(LedgerFailed):
    """A file of the ledger was removed or replaced while a run was using it."""

    def __init__(self, message: str, hint: str | None = None, *, database_missing: bool = True) -> None:
        """`database_missing`: the database itself is no longer at its path, not only the lock file."""
        super().__init__(message, hint)
        self.database_missing = database_missing


class LeaseLost(LedgerFailed):
    """This process sent no heartbeat for too long. Other workers took over its work."""

    exit_code = ExitCode.API

    def __init__(self) -> None:
        super().__init__(
            "this process sent no heartbeat for too long, and other workers took over its tasks",
            "run the same command again: it resumes",
        )

    def __reduce__(self) -> tuple[type[LeaseLost], tuple[()]]:
        return type(self), ()


class RunEnded(LeaseLost):
    """The run that this process worked for has ended, so there is no work to resume."""


class Interrupted(EnrichError):
    """A signal ended the run. `exit_code` is 130 or 143."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__("interrupted: the same command resumes")
        self.exit_code = code


class ApiCallFailed(EnrichError):
    """One call to the API failed. The subclasses define what that means for the request."""

    exit_code = ExitCode.API


class RequestNotAccepted(ApiCallFailed):
    """The API certainly did not accept the request, so it can be sent again."""


class RateLimited(RequestNotAccepted):
    """429. `retry_after` is the Retry-After header in seconds, None without one."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CertificateUntrusted(RequestNotAccepted):
    """The certificate of the API or the proxy is not trusted. A retry does not help."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message, "if your network inspects TLS, set SSL_CERT_FILE to a file with its certificate (PEM)"
        )


class UnexpectedResponse(RequestNotAccepted):
    """The response to a free API call (account, waterfalls) has unexpected content."""


class RequestRefused(RequestNotAccepted):
    """A 3xx or 4xx to a poll or a cancellation that has no class of its own. A retry at once does not help."""


class OutOfCredits(RequestNotAccepted):
    """406: the account is out of credits, or its plan does not allow the request."""

    exit_code = ExitCode.CREDITS


class Unauthorized(RequestNotAccepted):
    """401 or 403: the API rejects the key."""

    exit_code = ExitCode.KEY


class InvalidPollResponse(RequestNotAccepted):
    """A poll response that is not valid: it names another task or no task, or cannot be read. Poll again.

    `raw` is its text, limited in size. `task_id` is the id in the response, None without one. `new_connection`: the
    connection carried no earlier request, so this cannot be the response to one.
    """

    def __init__(self, message: str, raw: str = "", task_id: str | None = None, *, new_connection: bool = True) -> None:
        super().__init__(message)
        self.raw = raw
        self.task_id = task_id
        self.new_connection = new_connection


class BadParams(ApiCallFailed):
    """400 or 422 that names a param of the job: the row fails.

    `rows` maps the index of a rejected row in the POST to the reason. Empty (bulk): some rows are rejected, and the API
    does not report which.
    """

    def __init__(self, rows: Mapping[int, str], message: str = "") -> None:
        super().__init__("; ".join(rows.values()) or message)
        self.rows = rows


class JobRejected(ApiCallFailed):
    """404, or a 400 or 422 that names no param of the job: no request of this job can be sent, so the run stops."""

    exit_code = ExitCode.USAGE


class TaskUnknown(ApiCallFailed):
    """404 for a task id: too new, or lost."""


class TaskFinished(ApiCallFailed):
    """409: the task has finished, so it cannot be cancelled."""


class SubmissionUnconfirmed(ApiCallFailed):
    """The request may have been accepted and charged: it becomes in_doubt. `task_id` is in the response, or None."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


def install_hint(extra: str) -> str:
    """Return the command that installs enrich with an extra. It is in no index, so the command names a file."""
    return f"pip install 'FILE[{extra}]', where FILE is the wheel of enrich or a folder with its source"


@contextmanager
def needs_extra(extra: str, message: str) -> Iterator[None]:
    """Raise JobError for an import in the block that fails without a package of the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("enrich"):
            raise
        raise JobError(message, install_hint(extra)) from error


def suggest_name(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the closest known name, or with all known names if they are few. None: no hint."""
    names = list(dict.fromkeys(known))
    if (closest := closest_name(name, names)) is not None:
        return did_you_mean(closest)
    max_listed = 12
    return f"known: {', '.join(names)}" if 0 < len(names) <= max_listed else None


def did_you_mean(name: str) -> str:
    """Return the hint that this name may be meant."""
    return f"did you mean `{printable(name)}`?"


def printable(text: str) -> str:
    """Escape unprintable characters, so that the text is one line."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a name; None: none is."""
    from difflib import get_close_matches  # noqa: PLC0415 - every command imports this file

    by_fold = {candidate.casefold(): candidate for candidate in known}
    close = get_close_matches(name.casefold(), by_fold, n=1, cutoff=0.6)
    return by_fold[close[0]] if close else None
