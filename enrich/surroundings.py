"""What an execution is given: the job, the way to the API, the ledger, the person's wishes, a clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from enrich.api.credentials import Access
from enrich.execution import Timing
from enrich.job import Job
from enrich.model import Clock, State, SystemClock, Wish
from enrich.planfile import FrozenPlan
from enrich.store.ledger import Ledger

if TYPE_CHECKING:  # whoever only looks at a run need not wait for what carries one
    from enrich.engine import Engine


@dataclass(frozen=True, slots=True)
class Spread:
    """Over which Ray cluster the work is spread: its address, None: one on this machine; None: as many as CPUs."""

    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What the person asked of this execution.

    `confirm` is shown what it may cost and says whether to go on; `plan` is kept to.
    """

    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    max_time_s: float | None = None
    retry: frozenset[State] = frozenset()
    accept_doubts: bool = False
    update_providers: bool = False
    #: The ledger's workspace has another name now.
    workspace_renamed: bool = False
    confirm: Callable[[str], bool] | None = None
    plan: FrozenPlan | None = None
    #: Pay with a new ledger though an earlier output was paid for from another; else the person is asked, or refused.
    new_ledger: bool = False
    confirm_new_ledger: Callable[[str], bool] | None = None
    #: Let Ray carry the work.
    spread: Spread | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an execution is, in requests; `spent` in credits, `total` None: not known yet."""

    total: int | None
    done: int
    found: int
    spent: float
    in_flight: int
    submitted: int = 0
    polls: int = 0
    rate_limited: int = 0


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
    #: Whether what we claimed is surely still ours, where several processes share a ledger.
    holds: Callable[[], bool] = lambda: True
    #: Who carries the steps; None: this machine alone.
    engine: Engine | None = None

    def asked_since(self) -> int:
        """Tell since when (ms) the API keeps the results of what was submitted."""
        return self.clock.now_ms() - int(self.job.model.policy.result_ttl.total_seconds() * 1000)


def rescue_folders(job: Job) -> tuple[Path, ...]:
    """Where a rescue file may lie beside the ledger's folder: the output's, which has no date in it, and the job's."""
    home = job.document.path.resolve().parent
    if not isinstance(job.output_path(datetime.now().astimezone()), Path):
        return (home,)
    parts = Path(os.path.normpath(job.output_base / job.output.path)).parts
    dated = next((number for number, part in enumerate(parts) if "%" in part), len(parts))
    return (Path(*parts[: min(dated, len(parts) - 1)]), home)


def wish(job: Job, options: Options, now_ms: int) -> Wish:
    """Put together which requests an execution wants: by the job, and by the person's word.

    A plan is kept to as if it were still the time when it was made, so that it chooses the same requests.
    """
    plan = options.plan
    if plan is not None:
        options = replace(
            options, limit=plan.limit, sample=plan.sample, seed=plan.seed, retry=frozenset(plan.retry), plan=None
        )
        now_ms = plan.made_ms
    refresh = job.model.policy.refresh
    ages = {State.FOUND: refresh.found, State.NOT_FOUND: refresh.not_found}
    return Wish(
        retry=options.retry,
        stale={state: now_ms - int(age.total_seconds() * 1000) for state, age in ages.items() if age is not None},
        max_per_group=None if job.model.caps is None else job.model.caps.max,
        sample=options.sample,
        seed=options.seed,
        limit=options.limit,
        since=None if plan is None else plan.after_execution,
    )
