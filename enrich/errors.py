"""All exceptions, grouped by what the caller does about them.

EnrichError                        message, hint and exit code
├── JobError                 2     the command or the job file is wrong: fix it
│   └── WorkspaceMismatch          the key does not belong to the ledger's workspace
├── ApiKeyRejected           3     no key, or the API rejects it: fix the key
├── ApiUnreachable           4     the API does not respond: the next run resumes
├── ClusterFailed            4     the cluster cannot be reached or started: the next run resumes
├── CommandRefused           5     nothing was spent: check the input, the balance, the ledger
│   ├── RunDeclined                the run needs a confirmation, and leaves no record
│   │   └── RunCancelled           the user answered no
│   └── LedgerDamaged              the ledger's file is damaged
├── LedgerLocked            11     another run is in progress
├── Interrupted        130,143     a signal ended the run
├── CanaryStopped           15     the first answers look wrong: nothing more is sent
├── LedgerFailed             1     the ledger cannot be written: nothing more is sent
│   ├── LedgerMoved                a file of the ledger was removed or replaced
│   └── LeaseLost            4     no heartbeat for too long: other workers took over the work
│       └── RunEnded               the run that this process worked for has ended
└── ApiCallFailed            4     one API call failed
    ├── RequestNotAccepted         the request was certainly not accepted: wait and retry
    │   ├── RateLimited            429
    │   ├── CertificateUntrusted   TLS: a retry does not help
    │   ├── UnexpectedResponse     a response with unexpected content
    │   ├── RequestRefused         another 3xx or 4xx to a poll or a cancellation
    │   ├── OutOfCredits           406: stop with exit code 12
    │   ├── Unauthorized           401, 403: stop with exit code 3
    │   └── InvalidPollResponse    unreadable, or possibly for another task: poll again
    ├── BadParams                  400, 422 that name a param: the row fails
    ├── TaskUnknown                404 for a task: too new, or lost
    ├── TaskFinished               409: the task can no longer be cancelled
    ├── JobRejected                any other 400, 422, and 404: stop with exit code 2
    └── SubmissionUnconfirmed      may have been accepted: the request becomes in_doubt
"""

from __future__ import annotations

from collections.abc import Mapping

from enrich.exit_codes import ExitCode


class EnrichError(Exception):
    """An error shown to the user: what is wrong and where (`message`), and what to do (`hint`, or None)."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class JobError(EnrichError):
    """The command or the job file is wrong."""

    exit_code = ExitCode.USAGE


class WorkspaceMismatch(JobError):
    """The key belongs to a different workspace than the ledger, or the workspace was renamed."""


class ApiKeyRejected(EnrichError):
    """There is no usable API key, or the API rejects it."""

    exit_code = ExitCode.KEY


class ApiUnreachable(EnrichError):
    """The API does not respond. The next run resumes."""

    exit_code = ExitCode.API


class ClusterFailed(EnrichError):
    """The machines of the cluster cannot be reached or started. The next run resumes."""

    exit_code = ExitCode.API


class CommandRefused(EnrichError):
    """The command was refused before any credits were spent."""

    exit_code = ExitCode.REFUSED


class RunDeclined(CommandRefused):
    """The run needs a confirmation, and there is no terminal for it. No record of the run is kept."""


class RunCancelled(RunDeclined):
    """The user answered no."""

    def __init__(self) -> None:
        super().__init__("Cancelled. Nothing sent.")


class LedgerDamaged(CommandRefused):
    """The ledger's file is damaged: its content is not what was written."""


#: Hint for LedgerLocked.
LOCKED_HINT = "`enrich status JOB --watch` shows it"


class LedgerLocked(EnrichError):
    """Another run has locked the ledger."""

    exit_code = ExitCode.LOCKED


class CanaryStopped(EnrichError):
    """The first answers look wrong. The remaining requests were not sent."""

    exit_code = ExitCode.CANARY


class LedgerFailed(EnrichError):
    """The ledger could not be written during a run."""


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
        super().__init__("interrupted: the next run collects the running tasks")
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
    """A poll response that is not valid: it names another task or no task, or cannot be read.

    `raw` is its text, limited in size. `task_id` is the id in the response, None without one. `new_connection`: the
    connection carried no earlier request, so this cannot be the response to one.
    """

    def __init__(self, message: str, raw: str = "", task_id: str | None = None, *, new_connection: bool = True) -> None:
        super().__init__(message)
        self.raw = raw
        self.task_id = task_id
        self.new_connection = new_connection


class BadParams(ApiCallFailed):
    """400 or 422 that names a param. `rows` maps the index of each rejected row in the POST (from 0) to the reason.

    Empty `rows` (bulk): some rows are rejected, and the API does not report which.
    """

    def __init__(self, rows: Mapping[int, str], message: str = "") -> None:
        super().__init__("; ".join(rows.values()) or message)
        self.rows = rows


class JobRejected(ApiCallFailed):
    """404, or a 400 or 422 that names no param: no request of this job can be sent."""

    exit_code = ExitCode.USAGE


class TaskUnknown(ApiCallFailed):
    """404 for a task id."""


class TaskFinished(ApiCallFailed):
    """409: the task has finished, so it cannot be cancelled."""


class SubmissionUnconfirmed(ApiCallFailed):
    """The request may have been accepted and charged. `task_id` is the id in the response, None without one."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
