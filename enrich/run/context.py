"""What a run is given: the job, access to the API, the ledger, the user's options, a clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from enrich.databar.clock import Clock, SystemClock
from enrich.databar.credentials import ApiAccess
from enrich.job.job import Job
from enrich.ledger.ledger import Ledger
from enrich.models import RequestSelection, State
from enrich.run.plan_file import SavedPlan
from enrich.run.state import Timeouts

if TYPE_CHECKING:  # commands that only read runs need not import the cluster
    from enrich.run.cluster import ClusterEngine


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """The Ray cluster that runs the work. `address` None: one on this machine; `workers` None: one per CPU."""

    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The user's options for this run.

    `confirm` is given the expected cost as text and returns whether to continue. The run follows `plan`.
    """

    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    max_time_s: float | None = None
    retry: frozenset[State] = frozenset()
    accept_doubts: bool = False
    update_providers: bool = False
    #: The ledger's workspace has a new name.
    workspace_renamed: bool = False
    confirm: Callable[[str], bool] | None = None
    plan: SavedPlan | None = None
    #: Use a new ledger though an earlier output was paid for from another. Unset: ask the user, or refuse the run.
    new_ledger: bool = False
    confirm_new_ledger: Callable[[str], bool] | None = None
    #: Run the work on Ray.
    spread: ClusterOptions | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run, in requests. `spent` is in credits; `total` None: not known yet."""

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
    """What a run works with. Tests pass their own clock and timeouts.

    `on_message` gets messages for the user at once; `on_progress` is called often.
    """

    job: Job
    access: ApiAccess
    ledger: Ledger
    clock: Clock = field(default_factory=SystemClock)
    timeouts: Timeouts = field(default_factory=Timeouts)
    on_message: Callable[[str], None] = lambda _: None
    on_progress: Callable[[Progress], None] = lambda _: None
    #: Whether this process certainly still holds its claims, where several processes share a ledger.
    lease_valid: Callable[[], bool] = lambda: True
    #: The cluster that runs the phases; None: this machine alone.
    engine: ClusterEngine | None = None

    def results_kept_since_ms(self) -> int:
        """Return the earliest time of submission (UTC, ms) whose results the API still keeps."""
        return self.clock.now_ms() - int(self.job.model.policy.result_ttl.total_seconds() * 1000)


def rescue_folders(job: Job) -> tuple[Path, ...]:
    """Return where a rescue file may be besides the ledger's folder: the output's (its undated part) and the job's."""
    job_folder = job.document.path.resolve().parent
    if not isinstance(job.output_path(datetime.now().astimezone()), Path):
        return (job_folder,)
    parts = Path(os.path.normpath(job.output_base / job.output.path)).parts
    dated = next((number for number, part in enumerate(parts) if "%" in part), len(parts))
    return (Path(*parts[: min(dated, len(parts) - 1)]), job_folder)


def select_requests(job: Job, options: RunOptions, now_ms: int) -> RequestSelection:
    """Build the selection of requests from the job and the user's options.

    A plan is applied as of the time when it was made, so that it selects the same requests.
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
