"""What an execution is given: the job, the way to the API, the ledger, the person's wishes, a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from enrich.credentials import Access
from enrich.execution import Timing
from enrich.job import Job
from enrich.ledger import Ledger
from enrich.model import Clock, State, SystemClock


@dataclass(frozen=True, slots=True)
class Options:
    """What the person asked of this execution. `confirm` is shown what it may cost and says whether to go on."""

    limit: int | None = None
    max_time_s: float | None = None
    retry: frozenset[State] = frozenset()
    accept_doubts: bool = False
    update_providers: bool = False
    confirm: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an execution is, in requests; `spent` in credits."""

    total: int
    done: int
    found: int
    spent: float
    in_flight: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an execution works with; tests bring their own clock and patience.

    `tell` hears what a person should know at once, `show` is called often with how far it is.
    """

    job: Job
    access: Access
    ledger: Ledger
    clock: Clock = field(default_factory=SystemClock)
    timing: Timing = field(default_factory=Timing)
    tell: Callable[[str], None] = lambda _: None
    show: Callable[[Progress], None] = lambda _: None
