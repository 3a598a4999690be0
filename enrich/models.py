"""The vocabulary: the states of a request, the moves between them, money and time."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, overload

import orjson


class State(StrEnum):
    """Where a request stands."""

    PENDING = "pending"  # not asked yet
    SUBMITTING = "submitting"  # the intent is on disk, the POST may be on the wire
    SUBMITTED = "submitted"  # the API gave a task id
    FOUND = "found"  # one of the job's columns has a value
    NOT_FOUND = "not_found"  # a clean miss
    FAILED = "failed"  # the API says so
    EXPIRED = "expired"  # the result was gone before it was fetched
    IN_DOUBT = "in_doubt"  # nobody can tell whether it was charged


#: Every allowed move of a request, by the letters of the drawing in ARCHITECTURE.md. What f and h send back to
#: pending moves on to submitting in the same transaction: until then it keeps its state, and when the POST is
#: refused it has it again.
TRANSITIONS: dict[tuple[State, State], str] = {
    (State.PENDING, State.SUBMITTING): "a: the intent is on disk before the POST leaves",
    (State.SUBMITTING, State.SUBMITTED): "b: the API answered with a task id",
    (State.SUBMITTING, State.PENDING): "c: provably not accepted",
    (State.SUBMITTING, State.FAILED): "c: the API named a param that is wrong, or refused a retry",
    (State.SUBMITTING, State.EXPIRED): "c: the API refused a retry",
    (State.SUBMITTING, State.FOUND): "c: the API refused a refresh",
    (State.SUBMITTING, State.NOT_FOUND): "c: the API refused a refresh",
    (State.SUBMITTING, State.IN_DOUBT): "d: bytes may have left, or the process died, or a retry was refused",
    (State.SUBMITTED, State.FOUND): "e: the poller brought the answer",
    (State.SUBMITTED, State.NOT_FOUND): "e: the poller brought the answer",
    (State.SUBMITTED, State.FAILED): "e: the poller brought the answer",
    (State.SUBMITTED, State.EXPIRED): "e: the result is gone",
    (State.SUBMITTED, State.IN_DOUBT): "e: a task that was never seen alive polls 404",
    (State.IN_DOUBT, State.SUBMITTING): "f, a: only by the person's word",
    (State.IN_DOUBT, State.FAILED): "f: the person takes it for lost",
    (State.FAILED, State.SUBMITTING): "f, a: only by the person's word",
    (State.EXPIRED, State.SUBMITTING): "f, a: only by the person's word",
    (State.IN_DOUBT, State.SUBMITTED): "i: the API knows its task after all",
    (State.EXPIRED, State.SUBMITTED): "i: the API knows its task after all",
    (State.SUBMITTED, State.PENDING): "g: failed at no charge, attempts are left",
    (State.FOUND, State.SUBMITTING): "h, a: older than policy.refresh allows",
    (State.NOT_FOUND, State.SUBMITTING): "h, a: older than policy.refresh allows",
}

#: States in which money may be at stake: the fate is not known yet.
OPEN_STATES = frozenset({State.SUBMITTING, State.SUBMITTED})
#: States that a person may send back to pending (edge f).
RETRYABLE_STATES = frozenset({State.FAILED, State.EXPIRED, State.IN_DOUBT})


class Decision(StrEnum):
    """Whether a request, or a row, is asked by this execution, or why it isn't."""

    NEW = "new"  # never answered
    RETRY = "retry"  # asked again by the person's word
    REFRESH = "refresh"  # asked again for its answer's age
    FOUND = "found"  # answered before
    NOT_FOUND = "not_found"  # answered before
    FAILED = "failed"
    EXPIRED = "expired"
    IN_DOUBT = "in_doubt"
    WAITING = "waiting"  # at the API: its answer is collected
    PLANNED = "planned"  # asked since the plan was made that this execution keeps to
    CAPPED = "capped"  # the job's `caps` leave it out
    NOT_SAMPLED = "not_sampled"  # left out by --sample
    OVER_LIMIT = "over_limit"  # left for another execution by --limit
    DUPLICATE = "duplicate"  # of a row: it asks what an earlier one asks
    INVALID = "invalid"  # of a row: a required param is empty or malformed
    FILTERED = "filtered"  # of a row: the job leaves it out


#: What is sent and paid for.
DECISIONS_TO_SEND = (Decision.NEW, Decision.RETRY, Decision.REFRESH)


class RowStatus(StrEnum):
    """What `enrich_status` says of a row of the output."""

    FOUND = "found"
    NOT_FOUND = "not_found"
    FAILED = "failed"
    EXPIRED = "expired"
    IN_DOUBT = "in_doubt"
    INVALID = "invalid"  # a required param is empty or malformed: never sent
    FILTERED = "filtered"  # the job leaves it out
    PENDING = "pending"  # not answered yet

    @classmethod
    def from_state(cls, state: State) -> RowStatus:
        """Tell how a request's state shows on its rows."""
        return cls.PENDING if state in OPEN_STATES else cls(state.value)


def count_by_status(counts: Mapping[State, int]) -> dict[str, int]:
    """Count requests by the status that they show on their rows."""
    shown = [status for status in RowStatus if status not in (RowStatus.INVALID, RowStatus.FILTERED)]
    return {
        status.value: sum(count for state, count in counts.items() if RowStatus.from_state(state) is status)
        for status in shown
    }


#: One credit in the ledger's unit: credits are integers there, in millionths.
MICROS_PER_CREDIT = 1_000_000


#: More credits than this are no price and no balance.
MAX_CREDITS = 1_000_000_000_000


def to_micros(credits_: object) -> int | None:
    """Read credits as the API writes them (number or string); None when they can't be read."""
    return _read_credits(credits_, 0, MAX_CREDITS)


def read_balance(balance: object) -> int | None:
    """Read a balance, which may be below 0, in millionths; None when it can't be read."""
    return _read_credits(balance, -MAX_CREDITS, MAX_CREDITS)


def _read_credits(credits_: object, minimum: int, maximum: int) -> int | None:
    if credits_ is None or isinstance(credits_, bool):
        return None
    try:
        amount = Decimal(str(credits_).strip())
        return int((amount * MICROS_PER_CREDIT).to_integral_value()) if minimum <= amount <= maximum else None
    except ArithmeticError:  # no number, or NaN, which compares with nothing
        return None


@overload
def to_credits(micros: int) -> float: ...
@overload
def to_credits(micros: int | None) -> float | None: ...
def to_credits(micros: int | None) -> float | None:
    """Write millionths as credits; None (not known) stays None."""
    return None if micros is None else micros / MICROS_PER_CREDIT


def pluralize(number: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_credits(amount: float) -> str:
    """Write credits for a person; what is less than a hundredth is not nothing."""
    text = f"{amount:,.2f}"
    if text.strip("-0."):
        return text
    exact = f"{amount:.6f}".rstrip("0")
    return exact if exact.strip("-0.") else "0.00"


def to_json_text(value: object) -> str:
    """Write a value as JSON. Raises RecursionError when it is nested too deeply."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # a number that is too large for it, half a character, or nested deeply
        return json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()


def iso_time(at_ms: int) -> str:
    """Write a time of the ledger (milliseconds since 1970, UTC) as ISO 8601."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_duration(seconds: float) -> str:
    """Write a length of time as h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


#: A local clock that is off by more than this is not believed.
CLOCK_TOLERANCE_MS = 5 * 60 * 1000
#: So many answers must say by how much it is off, and differ by no more than this.
CLOCK_SAMPLES, CLOCK_SAMPLE_SPREAD_MS = 3, 5_000


class Clock(Protocol):
    """Time as a parameter: tests bring their own."""

    def monotonic(self) -> float:
        """Seconds that never step: for rates and pauses."""

    def now_ms(self) -> int:
        """Milliseconds since 1970, UTC: written down, shown to people, and the age of what earlier runs left."""

    def earliest_ms(self) -> int:
        """The earliest that it may be now by any clock: for what costs money when it is late enough."""

    def observe(self, api_ms: int) -> None:
        """Take in what time the API has."""


def boottime() -> float:
    """Seconds that never step, and go on while the machine sleeps, where the system has such a clock."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _boottime_ms() -> int:
    return int(boottime() * 1000)


@dataclass(slots=True)
class SystemClock:
    """This machine's clock as it stood when the program started: steps that it makes later change nothing.

    It is corrected by the API's `Date` when several answers agree that it is off by more than 5 minutes.
    """

    offset_ms: int = 0
    #: The local time when the machine started.
    _boot_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000 - _boottime_ms(), init=False)
    #: By how much the API's last answers say that it is off.
    _api_offsets_ms: deque[int] = field(default_factory=lambda: deque(maxlen=CLOCK_SAMPLES), init=False)

    def monotonic(self) -> float:
        """Seconds that never step."""
        return time.monotonic()

    def now_ms(self) -> int:
        """Milliseconds since 1970, UTC."""
        return self._local_ms() + self.offset_ms

    def earliest_ms(self) -> int:
        """The earliest that it may be now by this machine or any of the last answers."""
        behind = (off for off in (self.offset_ms, *self._api_offsets_ms) if off < -CLOCK_TOLERANCE_MS)
        return self._local_ms() + min(behind, default=0)

    def observe(self, api_ms: int) -> None:
        """Take over the API's time when ours is too far off, by several answers: one may be wrong or from a cache."""
        self._api_offsets_ms.append(api_ms - self._local_ms())
        low, high = min(self._api_offsets_ms), max(self._api_offsets_ms)
        if len(self._api_offsets_ms) == CLOCK_SAMPLES and high - low <= CLOCK_SAMPLE_SPREAD_MS:
            self.offset_ms = high if abs(high) > CLOCK_TOLERANCE_MS else 0

    def _local_ms(self) -> int:
        return self._boot_ms + _boottime_ms()


@dataclass(frozen=True, slots=True)
class Call:
    """What is the same for every request of a job: which waterfall, asked of whom, checked by whom."""

    waterfall: str
    enrichments: tuple[int, ...]
    email_verifier: int | None = None

    def canonical(self) -> str:
        """Write the call so that equal calls are equal text (JSON)."""
        return json.dumps(self.body() | {"waterfall": self.waterfall}, sort_keys=True)

    def body(self) -> dict[str, Any]:
        """Return what the API is sent beside `params`."""
        body: dict[str, Any] = {"enrichments": list(self.enrichments)}
        if self.email_verifier is not None:
            body["email_verifier"] = self.email_verifier
        return body


class RowRequest(NamedTuple):
    """What a row asks: its position in the input, the request's name, what is sent (JSON).

    `place` is where it stands in the order of asking (default: the position), `group` what `caps` counts.
    """

    position: int
    fingerprint: bytes
    params: str
    queue_position: int | None = None
    group: str | None = None


class RowDecision(NamedTuple):
    """What was decided about a row: the position of the first that asks the same, and when it was answered (ms)."""

    position: int
    first_position: int
    decision: Decision
    settled_ms: int | None


@dataclass(frozen=True, slots=True)
class RequestSelection:
    """Which requests an execution wants. `stale`: answers older than that (ms) are asked again.

    `since`: choose as if nothing had been asked after this execution, the newest when a plan was made.
    `killed`: no execution is at work, so what seems to be on the wire was left there by one that was killed.
    """

    retry: frozenset[State] = frozenset()
    refresh_before_ms: Mapping[State, int] = field(default_factory=dict)
    max_per_group: int | None = None
    sample: int | None = None
    seed: int = 0
    limit: int | None = None
    after_execution: int | None = None
    no_active_run: bool = False

    @property
    def is_limited(self) -> bool:
        """Whether the person said how many are asked at most."""
        return not (self.limit is self.sample is self.after_execution is None)


@dataclass(frozen=True, slots=True)
class Claim:
    """A request whose intent to submit is on disk: exactly one POST may leave for it, or for all of its bundle."""

    attempt_id: int
    params: str
    bulk_task_id: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What waits for its answer at the API: the attempt of one request, or those of a bundle in the order sent."""

    attempts: tuple[int, ...]
    task_id: str
    submitted_ms: int
    acknowledged: bool = False
    #: The columns' paths of the job that asked; () where they are not known.
    column_paths: tuple[str, ...] = ()
    bulk_task_id: int | None = None
    #: A newer attempt of the same request was made meanwhile.
    superseded: bool = False


class Acceptance(StrEnum):
    """What a task id means that the API gave to a POST."""

    NEW = "new"
    CACHED = "cached"  # an attempt of the same question has it: the API's cache
    CONFLICT = "taken"  # an attempt of another question has it: no acceptance


#: What is said of a request whose task id belongs to another.
DUPLICATE_TASK_ID = "the API gave a task id twice"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a task came to, ready for the ledger. `credits` in millionths, None when not known.

    `gone`: the API says that the result is deleted, so it need not be asked for again.
    """

    state: State
    error: str | None = None
    provider: str | None = None
    credits: int | None = None
    raw: str | None = field(default=None, repr=False)
    free_failure: bool = False
    result_deleted: bool = False


class SettledAttempt(NamedTuple):
    """An attempt that an execution settled: what it asked of whom, what came of it and what it cost.

    `state` is the value of a State, `call` a canonical Call, `params` and `answer` are JSON (`answer` None: there is
    none, or it was purged). `paid` is what it adds to the bill in millionths; None: not known.
    """

    execution: int
    state: str
    call: str
    params: str
    paid: int | None
    answer: str | None
    erased: int


class RequestResult(NamedTuple):
    """What the ledger knows of one request of a batch, as it comes out of it; 1 is for yes.

    `position` is that of the first row of the batch that asks it; `first`: no earlier row of this pass did.
    `state` is the value of a State. `capped`: the job's `caps` leave it out. `erased_ms`: when its answer was purged.
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
