"""What an execution is given: the job, the way to the API, the ledger, the person's wishes, a clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from enrich.databar.credentials import ApiAccess
from enrich.job.job import Job
from enrich.ledger.ledger import Ledger
from enrich.models import Clock, RequestSelection, State, SystemClock
from enrich.run.plan_file import SavedPlan
from enrich.run.state import Timeouts

if TYPE_CHECKING:  # whoever only looks at a run need not wait for what carries one
    from enrich.run.cluster import ClusterEngine


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Over which Ray cluster the work is spread: its address, None: one on this machine; None: as many as CPUs."""

    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class RunOptions:
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
    plan: SavedPlan | None = None
    #: Pay with a new ledger though an earlier output was paid for from another; else the person is asked, or refused.
    new_ledger: bool = False
    confirm_new_ledger: Callable[[str], bool] | None = None
    #: Let Ray carry the work.
    spread: ClusterOptions | None = None


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
class RunContext:
    """What an execution works with; tests bring their own clock and patience.

    `tell` hears what a person should know at once, `show` is called often with how far it is.
    """

    job: Job
    access: ApiAccess
    ledger: Ledger
    clock: Clock = field(default_factory=SystemClock)
    timeouts: Timeouts = field(default_factory=Timeouts)
    on_message: Callable[[str], None] = lambda _: None
    on_progress: Callable[[Progress], None] = lambda _: None
    #: Whether what we claimed is surely still ours, where several processes share a ledger.
    lease_valid: Callable[[], bool] = lambda: True
    #: Who carries the steps; None: this machine alone.
    engine: ClusterEngine | None = None

    def results_kept_since_ms(self) -> int:
        """Tell since when (ms) the API keeps the results of what was submitted."""
        return self.clock.now_ms() - int(self.job.model.policy.result_ttl.total_seconds() * 1000)


def rescue_folders(job: Job) -> tuple[Path, ...]:
    """Where a rescue file may lie beside the ledger's folder: the output's, which has no date in it, and the job's."""
    job_folder = job.document.path.resolve().parent
    if not isinstance(job.output_path(datetime.now().astimezone()), Path):
        return (job_folder,)
    parts = Path(os.path.normpath(job.output_base / job.output.path)).parts
    dated = next((number for number, part in enumerate(parts) if "%" in part), len(parts))
    return (Path(*parts[: min(dated, len(parts) - 1)]), job_folder)


def select_requests(job: Job, options: RunOptions, now_ms: int) -> RequestSelection:
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
    return RequestSelection(
        retry=options.retry,
        refresh_before_ms={
            state: now_ms - int(age.total_seconds() * 1000) for state, age in ages.items() if age is not None
        },
        max_per_group=None if job.model.caps is None else job.model.caps.max,
        sample=options.sample,
        seed=options.seed,
        limit=options.limit,
        after_execution=None if plan is None else plan.after_execution,
    )
