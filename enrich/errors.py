"""Every way to fail, sorted by what the caller does about it.

EnrichError                   carries the message, a hint and the exit code
├── JobError            2     the command or the job file is wrong: fix it
│   └── OtherWorkspace        the key is not of the workspace that the ledger belongs to
├── KeyRefused          3     no key, or the API refuses it: fix the key
├── ApiUnreachable      4     the API does not answer: the next run resumes
├── ClusterFailed       4     the machines that shall do the work can't be reached: likewise
├── Refused             5     nothing was spent: look at the input, the balance, the ledger
├── LedgerLocked       11     another execution is at work
├── Interrupted    130,143  a signal ended it
├── CanaryStopped      15     the first answers look wrong: nothing more is bought
├── LedgerFailed        1     the ledger can't remember any more: nothing more is sent
│   └── LeaseLost       4     this process was silent for too long: others go on with what it was at
│       └── LeaderGone        the run that this process worked for is over
└── CallFailed                one API call went wrong
    ├── NotAccepted           provably nothing was accepted: wait, ask again
    │   ├── RateLimited       429
    │   ├── CertificateUntrusted  TLS: asking again changes nothing
    │   ├── NotUnderstood     an answer of another kind than was asked for
    │   ├── OutOfCredits      406: stop with exit 12
    │   ├── Unauthorized      401, 403: stop with exit 3
    │   └── NotBelieved       the answer to a poll cannot be read, or may be another task's: ask again
    ├── BadParams             400, 422 that name a param: fail the row
    ├── TaskUnknown           404 for a task: too young, or lost
    ├── JobRejected           any other 400, 422, and 404: stop with exit 2
    └── Ambiguous             nobody can tell whether it was accepted: in doubt
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes, one meaning each; other people's crontabs stand on them."""

    OK = 0
    BUG = 1
    USAGE = 2
    KEY = 3
    API = 4
    REFUSED = 5
    SOME_FAILED = 10
    LOCKED = 11
    CREDITS = 12
    TIME = 13
    IN_DOUBT = 14
    CANARY = 15
    INTERRUPTED = 130
    TERMINATED = 143


#: When several hold, the first of these is the exit code (11 comes before all that could hold with it).
EXIT_PRECEDENCE = (
    ExitCode.BUG,
    ExitCode.INTERRUPTED,
    ExitCode.TERMINATED,
    ExitCode.KEY,
    ExitCode.USAGE,
    ExitCode.REFUSED,
    ExitCode.CANARY,
    ExitCode.CREDITS,
    ExitCode.API,
    ExitCode.TIME,
    ExitCode.IN_DOUBT,
    ExitCode.SOME_FAILED,
    ExitCode.OK,
)

#: The output is written at these; at the others the old file stays.
OUTPUT_WRITING_CODES = frozenset(
    {ExitCode.OK, ExitCode.API, ExitCode.SOME_FAILED, ExitCode.CREDITS, ExitCode.TIME, ExitCode.IN_DOUBT}
)


class EnrichError(Exception):
    """A failure told to the person: what is wrong and where (`message`), what to do (`hint`)."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class JobError(EnrichError):
    """The command or the job file is wrong."""

    exit_code = ExitCode.USAGE


class WorkspaceMismatch(JobError):
    """The key belongs to another workspace than the ledger, or the workspace was renamed."""


class ApiKeyRejected(EnrichError):
    """There is no API key, or the API refuses it."""

    exit_code = ExitCode.KEY


class ApiUnreachable(EnrichError):
    """The API does not answer; what was begun is resumed by the next run."""

    exit_code = ExitCode.API


class ClusterFailed(EnrichError):
    """The machines that shall do the work can't be reached or started; the next run resumes."""

    exit_code = ExitCode.API


class CommandRefused(EnrichError):
    """Refused before anything was spent."""

    exit_code = ExitCode.REFUSED


class LedgerDamaged(CommandRefused):
    """The ledger's file is not what was written into it."""


#: What a person can do about a ledger that another has.
LOCKED_HINT = "wait for it, or use --if-locked skip or wait"


class LedgerLocked(EnrichError):
    """Another execution holds the ledger."""

    exit_code = ExitCode.LOCKED


class CanaryStopped(EnrichError):
    """The first answers look wrong: the rest was not asked."""

    exit_code = ExitCode.CANARY


class LedgerFailed(EnrichError):
    """The ledger could not be written in the middle of an execution."""


class LedgerMoved(LedgerFailed):
    """A file of the ledger was removed or replaced while a run was using it."""

    def __init__(self, message: str, hint: str | None = None, *, database_missing: bool = True) -> None:
        """`gone`: the database itself is no longer at its path, not only the lock file."""
        super().__init__(message, hint)
        self.database_missing = database_missing


class LeaseLost(LedgerFailed):
    """This process was silent for too long: what it was at is another's now."""

    exit_code = ExitCode.API

    def __init__(self) -> None:
        super().__init__(
            "this process was silent for too long, and what it was at was given to others",
            "run the same command again: it goes on where the ledger stands",
        )

    def __reduce__(self) -> tuple[type[LeaseLost], tuple[()]]:
        return type(self), ()


class RunEnded(LeaseLost):
    """The run that this process worked for is over: there is nothing to begin anew."""


class Interrupted(EnrichError):
    """A signal ended the execution."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__("interrupted: what is at the API is collected by the next run")
        self.exit_code = code


class ApiCallFailed(EnrichError):
    """One call to the API went wrong; the subclasses say what that means for the request."""

    exit_code = ExitCode.API


class RequestNotAccepted(ApiCallFailed):
    """Provably nothing was accepted: the call may be made again."""


class RateLimited(RequestNotAccepted):
    """429. `retry_after` is the API's wish in seconds, None without one."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CertificateUntrusted(RequestNotAccepted):
    """The certificate of the API or of the proxy is not trusted: asking again changes nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "if the network inspects TLS, put its certificate into a file (PEM) and name that in SSL_CERT_FILE",
        )


class UnexpectedResponse(RequestNotAccepted):
    """A free question got an answer that is none to it."""


class OutOfCredits(RequestNotAccepted):
    """406: the account is out of credits, or the plan does not allow it."""

    exit_code = ExitCode.CREDITS


class Unauthorized(RequestNotAccepted):
    """401 or 403: the key is refused."""

    exit_code = ExitCode.KEY


class InvalidPollResponse(RequestNotAccepted):
    """An answer to a poll that does not count: it names another task, names none, or cannot be read.

    `task_id` is the id that it names, None without one. `raw` is its text, bounded. `fresh`: it came over a connection
    that had carried no request before, so that it cannot be the answer to an earlier one.
    """

    def __init__(self, message: str, raw: str = "", task_id: str | None = None, *, new_connection: bool = True) -> None:
        super().__init__(message)
        self.raw = raw
        self.task_id = task_id
        self.new_connection = new_connection


class BadParams(ApiCallFailed):
    """400 or 422 that names a param: these rows (by their place in the POST, from 0) cannot be asked.

    None of many (bulk): some of them can't, and the API does not say which.
    """

    def __init__(self, rows: Mapping[int, str], message: str = "") -> None:
        super().__init__("; ".join(rows.values()) or message)
        self.rows = rows


class JobRejected(ApiCallFailed):
    """404, or a 400 or 422 that names no param: no row of this job can be asked."""

    exit_code = ExitCode.USAGE


class TaskUnknown(ApiCallFailed):
    """404 for a task id."""


class SubmissionUnconfirmed(ApiCallFailed):
    """The call may or may not have been accepted. `task_id` is the id that the answer carried, None without one."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
