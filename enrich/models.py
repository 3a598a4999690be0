"""Shared types: request states, row decisions, answers, money and time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from itertools import repeat
from typing import Any, NamedTuple, overload

from msgspec import Struct


class State(StrEnum):
    """State of a request."""

    PENDING = "pending"  # not sent yet
    SUBMITTING = "submitting"  # the intent is on disk, the POST may be in flight
    SUBMITTED = "submitted"  # the API returned a task id
    FOUND = "found"  # at least one of the job's columns has a value
    NOT_FOUND = "not_found"  # no match, without an error
    FAILED = "failed"  # the API reports a failure
    EXPIRED = "expired"  # the API deleted the result before it was fetched
    IN_DOUBT = "in_doubt"  # unconfirmed: may have been charged


#: States in which a charge is possible and the outcome is not known yet.
OPEN_STATES = frozenset({State.SUBMITTING, State.SUBMITTED})
#: States that the user can reset to pending with `--retry` (edge f).
RETRYABLE_STATES = frozenset({State.FAILED, State.EXPIRED, State.IN_DOUBT})


class Decision(StrEnum):
    """Why this run sends, or does not send, a request or a row."""

    NEW = "new"  # never answered
    RETRY = "retry"  # sent again because of --retry
    REFRESH = "refresh"  # sent again because its answer is too old
    POSSIBLE = "possible"  # rows of a later step only: sent if the results of earlier steps require it
    FOUND = "found"  # already answered
    NOT_FOUND = "not_found"  # already answered
    FAILED = "failed"
    EXPIRED = "expired"
    IN_DOUBT = "in_doubt"
    WAITING = "waiting"  # running at Databar: this run collects its answer
    PLANNED = "planned"  # already sent since the saved plan that this run follows was made
    CAPPED = "capped"  # excluded by the job's `caps`
    NOT_SAMPLED = "not_sampled"  # excluded by --sample
    OVER_LIMIT = "over_limit"  # left for a later run by --limit
    DUPLICATE = "duplicate"  # rows only: same request as an earlier row
    INVALID = "invalid"  # rows only: a required param is empty or malformed
    FILTERED = "filtered"  # rows only: excluded by the job


#: Why a row, or its request, is left out by `caps`.
CAPPED_REASON = "over the per-group limit (caps)"
#: Decisions with which a request is sent and paid for.
DECISIONS_TO_SEND = (Decision.NEW, Decision.RETRY, Decision.REFRESH)
#: The decisions that limit and sample count. They include requests sent since the plan was saved.
COUNTED_TOWARDS_LIMIT = (*DECISIONS_TO_SEND, Decision.PLANNED)


class LeftOut(StrEnum):
    """Why a cell, although it is not empty, gives no value for a param."""

    PLACEHOLDER = "placeholder"  # N/A, #REF! …: see `blanks` in the job file
    NO_TEXT = "list, object or boolean"
    NUL = "NUL character"
    TOO_LONG = "too long"
    NO_DOMAIN = "no public host"
    NO_EMAIL = "no e-mail address"
    NO_COUNT = "no whole number above 0"
    NO_CHOICE = "none of the choices"
    SEVERAL = "two addresses"
    FREE_MAIL = "free mail"
    SOCIAL_NETWORK = "social network"
    SHARED_HOST = "shared host"


class RowStatus(StrEnum):
    """Values of `enrich_status`, the status column of the output."""

    FOUND = "found"
    NOT_FOUND = "not_found"
    FAILED = "failed"
    EXPIRED = "expired"
    IN_DOUBT = "in_doubt"
    INVALID = "invalid"  # skipped: a required param is empty or malformed, never sent
    FILTERED = "filtered"  # excluded by the job
    PENDING = "pending"  # not answered yet

    @classmethod
    def from_state(cls, state: State) -> RowStatus:
        """Return the status of the rows of a request in this state."""
        return cls.PENDING if state in OPEN_STATES else cls(state.value)


def count_by_status(counts: Mapping[State, int]) -> dict[str, int]:
    """Count requests by the status of their rows. `counts` are the requests in each state."""
    shown = [status for status in RowStatus if status not in (RowStatus.INVALID, RowStatus.FILTERED)]
    return {
        status.value: sum(count for state, count in counts.items() if RowStatus.from_state(state) is status)
        for status in shown
    }


#: A number as text. Python and YAML would also read `1_000`, `+1`, `0x10`, `nan` and digits of other scripts.
PLAIN_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)")
#: From the API also with an exponent: Python's decimals write zero as `0E-7`.
_API_NUMBER = re.compile(f"{PLAIN_NUMBER.pattern}([eE][-+]?[0-9]+)?")
#: A whole number as text. Python refuses to convert several thousand digits.
_PLAIN_COUNT = re.compile(r"[0-9]{1,100}")
#: The ledger stores credits as integers, in millionths of a credit.
MICROS_PER_CREDIT = 1_000_000
#: Maximum valid price or balance in credits. A higher value counts as unreadable.
MAX_CREDITS = 1_000_000_000_000


def to_ms(duration: timedelta) -> int:
    """Convert a duration to milliseconds."""
    return duration // timedelta(milliseconds=1)


def to_micros(credits_: object) -> int | None:
    """Convert credits from the API (number or string) to millionths. None if missing, negative or unreadable."""
    return _read_credits(credits_, 0, MAX_CREDITS)


def read_balance(balance: object) -> int | None:
    """Convert a balance (number or string, may be negative) to millionths. None if missing or unreadable."""
    return _read_credits(balance, -MAX_CREDITS, MAX_CREDITS)


def _read_credits(credits_: object, minimum: int, maximum: int) -> int | None:
    text = str(credits_).strip()
    if not _API_NUMBER.fullmatch(text):
        return None
    try:
        amount = Decimal(text)
        micros = int((amount * MICROS_PER_CREDIT).to_integral_value()) if minimum <= amount <= maximum else None
    except ArithmeticError:  # too large
        return None
    return 1 if micros == 0 and amount > 0 else micros  # only what is free is 0


def parse_count(text: str) -> int | None:
    """Return the whole number that a text is, in plain digits and without a sign. None for any other text."""
    return int(text) if _PLAIN_COUNT.fullmatch(text) else None


def whole_number(value: object) -> int | None:
    """Return a whole number from the API, such as 2 or 2.0. None for any other value, such as true."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@overload
def to_credits(micros: int) -> float: ...
@overload
def to_credits(micros: int | None) -> float | None: ...
def to_credits(micros: int | None) -> float | None:
    """Convert millionths to credits. None (unknown) stays None."""
    return None if micros is None else micros / MICROS_PER_CREDIT


#: What people read for the status of a request or a row. The other statuses are their own words.
STATUS_WORDS = {"not_found": "no match", "in_doubt": "unconfirmed", "invalid": "skipped"}


def job_title(name: str, *, sandbox: bool) -> str:
    """Return a job's name for people, marked for a sandbox run."""
    return f"SANDBOX {name}" if sandbox else name


def pluralize(number: float, noun: str) -> str:
    """Format an exact number with its noun, such as `1 row`, `1,000 rows`, `2 matches` or `0.5 credits`."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,.15g} {noun}{ending}"


def format_credits(amount: float) -> str:
    """Format credits with two decimals, or with up to six if the amount would otherwise show as zero."""
    text = f"{amount:,.2f}"
    if text.strip("-0."):
        return text
    exact = f"{amount:.6f}".rstrip("0")
    return exact if exact.strip("-0.") else "0.00"


@overload
def iso_time(at_ms: int) -> str: ...
@overload
def iso_time(at_ms: int | None) -> str | None: ...
def iso_time(at_ms: int | None) -> str | None:
    """Format a time of the ledger (milliseconds since 1970, UTC) as ISO 8601. None (unknown) stays None."""
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_elapsed(seconds: float) -> str:
    """Format a duration in seconds as `0.3 s`, `14 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 9.95:  # noqa: PLR2004 - shown as 10 s
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


class RequestBatch(Struct, frozen=True):
    """The requests of rows, as columns: an object for each of a million rows would take longer than reading the rows.

    `positions` are those of the rows in the input (from 0), `params` are JSON. `queue_positions` are ranks in the send
    order; None: the same as `positions`. `groups` has the values that `caps` counts; None: the job has none. `ids` are
    those in the ledger, where they are known. Then there are no fingerprints and no params before `complete` is called.
    """

    positions: Sequence[int]
    fingerprints: Sequence[bytes]
    params: Sequence[str]
    queue_positions: Sequence[int] | None = None
    groups: Sequence[str | None] | None = None
    ids: Sequence[int] | None = None
    complete: Callable[[], RequestBatch] | None = None

    def distinct(self) -> RequestBatch:
        """Return the requests without those of earlier rows. The lowest place in the send order counts."""
        names: Sequence[bytes | int] = self.fingerprints if self.ids is None else self.ids
        if len(set(names)) == len(names):
            return self
        first: dict[bytes | int, int] = {}
        queue_positions: dict[bytes | int, int] = {}
        for place, name in enumerate(names):
            first.setdefault(name, place)
        for name, position in zip(names, self.queue_positions or (), strict=False):
            queue_positions[name] = min(position, queue_positions.get(name, position))
        places = list(first.values())
        return RequestBatch(
            [self.positions[place] for place in places],
            [self.fingerprints[place] for place in places if self.fingerprints],
            [self.params[place] for place in places if self.params],
            list(queue_positions.values()) or None,
            None if self.groups is None else [self.groups[place] for place in places],
            None if self.ids is None else [self.ids[place] for place in places],
            self.complete,
        )


class RequestSelection(Struct, frozen=True):
    """Which requests a run sends. `refresh_before_ms`: answers older than this time (ms) are requested again.

    `after_execution`: select as if nothing was sent after this execution, the newest one when the plan was saved.
    `sent_in`: what this execution has sent is not selected again, for a later step that has the same request.
    `no_active_run`: no run is in progress, so requests in state submitting were left by a killed run.
    """

    retry: frozenset[State] = frozenset()
    refresh_before_ms: Mapping[State, int] = {}
    max_per_group: int | None = None
    sample: int | None = None
    seed: int = 0
    limit: int | None = None
    after_execution: int | None = None
    sent_in: int | None = None
    no_active_run: bool = False

    @property
    def is_limited(self) -> bool:
        """Whether the user limited the number of requests (`--limit`, `--sample` or a saved plan)."""
        return any(limit is not None for limit in (self.limit, self.sample, self.after_execution))

    @property
    def sent_again(self) -> frozenset[State]:
        """States of requests that may be sent again."""
        return self.retry | frozenset(self.refresh_before_ms)


class ClaimedRequest(NamedTuple):
    """A request whose intent to submit is on disk. Exactly one POST may be sent for it, or for its whole bulk task."""

    attempt_id: int
    params: str
    bulk_task_id: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A task running at the API. `attempts` is one attempt, or those of a bulk task in the order sent.

    `acknowledged`: a poll response has confirmed that the task exists. `step` has sent it; '': the job had none.
    """

    attempts: tuple[int, ...]
    task_id: str
    submitted_ms: int
    acknowledged: bool = False
    #: Result paths of the columns of the job that sent the request. () if unknown.
    column_paths: tuple[str, ...] = ()
    bulk_task_id: int | None = None
    superseded: bool = False  # a newer attempt of the same request exists
    #: Highest price of all its requests, in millionths.
    reserved: int = field(default=0, compare=False)
    step: str = field(default="", compare=False)


class Acceptance(StrEnum):
    """Meaning of the task id that the API returned for a POST."""

    NEW = "new"
    CACHED = "cached"  # an attempt of the same request already has this id: the API answered from its cache
    CONFLICT = "taken"  # an attempt of another request already has this id: the POST does not count as accepted


#: Error text of a request whose task id belongs to another request.
DUPLICATE_TASK_ID = "the API gave a task id twice"


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a task, ready for the ledger. `credits` are in millionths, None if unknown.

    `free_failure`: the task failed at no charge. `result_deleted`: the API deleted the result, so do not poll again.
    """

    state: State
    error: str | None = None
    provider: str | None = None
    credits: int | None = None
    raw: str | None = field(default=None, repr=False)
    free_failure: bool = False
    result_deleted: bool = False


class SettledAttempt(NamedTuple):
    """An attempt that a run settled: request, outcome and cost.

    `state` is the value of a State, `call` is a canonical Target. `params` and `answer` are JSON. `answer` is None if
    there is none or it was purged. `paid` is its charge in millionths of a credit, None if unknown.
    """

    execution: int
    state: str
    call: str
    params: str
    paid: int | None
    answer: str | None
    erased: int
    #: The step of the job that sent it; None: the job has none.
    step: str | None = None
    #: The provider of the answer, as it was stored with it.
    provider: str | None = None


class RequestResult(NamedTuple):
    """The ledger's data on one request of a batch, as read from the database (1 means yes).

    `position` is the first row of the batch with this request. `first`: no earlier row of the input has it.
    `state` is the value of a State. `credits` are in millionths. `capped`: excluded by the job's `caps`.
    `erased_ms` is when its answer was purged (milliseconds since 1970, UTC), else None.
    """

    position: int
    first: int
    state: str
    answer: str | None
    error: str | None
    provider: str | None
    credits: int | None
    task_id: str | None
    settled_ms: int | None
    attempt_id: int | None
    capped: int
    erased_ms: int | None


#: The results of a batch by field of RequestResult, in the order of its fields. Objects for a million rows would take
#: longer than reading them.
ResultColumns = Mapping[str, Sequence[Any]]


def result_columns(results: Sequence[RequestResult]) -> ResultColumns:
    """Return results as columns."""
    return dict(zip(RequestResult._fields, zip(*results, strict=True) if results else repeat(()), strict=False))
