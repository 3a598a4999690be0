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


class Exit(IntEnum):
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
PRECEDENCE = (
    Exit.BUG,
    Exit.INTERRUPTED,
    Exit.TERMINATED,
    Exit.KEY,
    Exit.USAGE,
    Exit.REFUSED,
    Exit.CANARY,
    Exit.CREDITS,
    Exit.API,
    Exit.TIME,
    Exit.IN_DOUBT,
    Exit.SOME_FAILED,
    Exit.OK,
)

#: The output is written at these; at the others the old file stays.
WRITES_OUTPUT = frozenset({Exit.OK, Exit.API, Exit.SOME_FAILED, Exit.CREDITS, Exit.TIME, Exit.IN_DOUBT})


class EnrichError(Exception):
    """A failure told to the person: what is wrong and where (`message`), what to do (`hint`)."""

    exit_code: Exit = Exit.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class JobError(EnrichError):
    """The command or the job file is wrong."""

    exit_code = Exit.USAGE


class OtherWorkspace(JobError):
    """The key belongs to another workspace than the ledger, or the workspace was renamed."""


class KeyRefused(EnrichError):
    """There is no API key, or the API refuses it."""

    exit_code = Exit.KEY


class ApiUnreachable(EnrichError):
    """The API does not answer; what was begun is resumed by the next run."""

    exit_code = Exit.API


class ClusterFailed(EnrichError):
    """The machines that shall do the work can't be reached or started; the next run resumes."""

    exit_code = Exit.API


class Refused(EnrichError):
    """Refused before anything was spent."""

    exit_code = Exit.REFUSED


class LedgerDamaged(Refused):
    """The ledger's file is not what was written into it."""


#: What a person can do about a ledger that another has.
LOCKED_HINT = "wait for it, or use --if-locked skip or wait"


class LedgerLocked(EnrichError):
    """Another execution holds the ledger."""

    exit_code = Exit.LOCKED


class CanaryStopped(EnrichError):
    """The first answers look wrong: the rest was not asked."""

    exit_code = Exit.CANARY


class LedgerFailed(EnrichError):
    """The ledger could not be written in the middle of an execution."""


class LedgerMoved(LedgerFailed):
    """A file of the ledger was removed or replaced while a run was using it."""

    def __init__(self, message: str, hint: str | None = None, *, gone: bool = True) -> None:
        """`gone`: the database itself is no longer at its path, not only the lock file."""
        super().__init__(message, hint)
        self.gone = gone


class LeaseLost(LedgerFailed):
    """This process was silent for too long: what it was at is another's now."""

    exit_code = Exit.API

    def __init__(self) -> None:
        super().__init__(
            "this process was silent for too long, and what it was at was given to others",
            "run the same command again: it goes on where the ledger stands",
        )

    def __reduce__(self) -> tuple[type[LeaseLost], tuple[()]]:
        return type(self), ()


class LeaderGone(LeaseLost):
    """The run that this process worked for is over: there is nothing to begin anew."""


class Interrupted(EnrichError):
    """A signal ended the execution."""

    def __init__(self, code: Exit) -> None:
        super().__init__("interrupted: what is at the API is collected by the next run")
        self.exit_code = code


class CallFailed(EnrichError):
    """One call to the API went wrong; the subclasses say what that means for the request."""

    exit_code = Exit.API


class NotAccepted(CallFailed):
    """Provably nothing was accepted: the call may be made again."""


class RateLimited(NotAccepted):
    """429. `retry_after` is the API's wish in seconds, None without one."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CertificateUntrusted(NotAccepted):
    """The certificate of the API or of the proxy is not trusted: asking again changes nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "if the network inspects TLS, put its certificate into a file (PEM) and name that in SSL_CERT_FILE",
        )


class NotUnderstood(NotAccepted):
    """A free question got an answer that is none to it."""


class OutOfCredits(NotAccepted):
    """406: the account is out of credits, or the plan does not allow it."""

    exit_code = Exit.CREDITS


class Unauthorized(NotAccepted):
    """401 or 403: the key is refused."""

    exit_code = Exit.KEY


class NotBelieved(NotAccepted):
    """An answer to a poll that does not count: it names another task, names none, or cannot be read.

    `task_id` is the id that it names, None without one. `raw` is its text, bounded. `fresh`: it came over a connection
    that had carried no request before, so that it cannot be the answer to an earlier one.
    """

    def __init__(self, message: str, raw: str = "", task_id: str | None = None, *, fresh: bool = True) -> None:
        super().__init__(message)
        self.raw = raw
        self.task_id = task_id
        self.fresh = fresh


class BadParams(CallFailed):
    """400 or 422 that names a param: these rows (by their place in the POST, from 0) cannot be asked.

    None of many (bulk): some of them can't, and the API does not say which.
    """

    def __init__(self, rows: Mapping[int, str], said: str = "") -> None:
        super().__init__("; ".join(rows.values()) or said)
        self.rows = rows


class JobRejected(CallFailed):
    """404, or a 400 or 422 that names no param: no row of this job can be asked."""

    exit_code = Exit.USAGE


class TaskUnknown(CallFailed):
    """404 for a task id."""


class Ambiguous(CallFailed):
    """The call may or may not have been accepted. `task_id` is the id that the answer carried, None without one."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
