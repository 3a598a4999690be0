"""What a run is given: the job, access to the API, the ledger, the user's options, its environment, a cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from enrich.databar.clock import Clock, SystemClock
from enrich.databar.environment import ApiAccess
from enrich.errors import CommandRefused
from enrich.job.job import Job
from enrich.job.locations import Location
from enrich.ledger.database import ledger_exists
from enrich.ledger.rescue_file import read_own_rescue_files
from enrich.models import RequestSelection, State, to_ms
from enrich.run.progress import Progress
from enrich.run.run_state import RunState, Timeouts, WorkConfig

if TYPE_CHECKING:  # commands that only read runs need not import what runs them
    from enrich.databar.client import Client
    from enrich.ledger.database import Database
    from enrich.ledger.writer import LedgerWriter
    from enrich.rows.batches import RowCounts
    from enrich.rows.job_input import JobInput
    from enrich.rows.template import RequestTemplate
    from enrich.run.budget import Budget
    from enrich.run.collector import OutputCounts
    from enrich.run.plan_file import SavedPlan
    from enrich.run.preflight import Preflight
    from enrich.run.signals import SignalHandler
    from enrich.run.step_rows import StepRows


class ClusterOptions(Struct, frozen=True):
    """The Ray cluster that runs the work. `address` None: one on this machine; `workers` None: one per CPU."""

    address: str | None = None
    workers: int | None = None


class RunOptions(Struct, frozen=True):
    """The user's options for this run.

    `confirm` is given the expected cost as text and returns whether to continue. The run follows `plan`, which replaces
    `limit`, `sample`, `seed` and `retry`.
    """

    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    max_time_s: float | None = None
    retry: frozenset[State] = frozenset()
    accept_in_doubt: bool = False
    update_providers: bool = False
    #: The ledger's workspace has a new name.
    workspace_renamed: bool = False
    confirm: Callable[[str], bool] | None = None
    plan: SavedPlan | None = None
    #: Use a new ledger even if an earlier output was paid for from another. False: ask the user, or refuse the run.
    new_ledger: bool = False
    confirm_new_ledger: Callable[[str], bool] | None = None
    #: Run the work on Ray; None: on this machine.
    cluster: ClusterOptions | None = None


class RunEnvironment(Struct, frozen=True):
    """Clock, timeouts, callbacks and cluster of a run. Tests pass their own clock and timeouts.

    `on_message` gets messages for the user at once, `on_problem` those that are also shown without a terminal;
    `on_progress` is called often.
    """

    clock: Clock = field(default_factory=SystemClock)
    timeouts: Timeouts = field(default_factory=Timeouts)
    on_message: Callable[[str], None] = lambda _: None
    on_problem: Callable[[str], None] = lambda _: None
    on_progress: Callable[[Progress], None] = lambda _: None
    #: Whether this process certainly still holds its claims, where several processes share a ledger.
    lease_valid: Callable[[], bool] = lambda: True
    #: Once it has a result, set by any thread, the run stops as after a SIGINT.
    stop: Future[None] = field(default_factory=Future)
    #: The cluster that runs the phases; None: this machine alone.
    engine: ClusterEngine | None = None


class RunContext(Struct, frozen=True):
    """All that a run is given. What it counts and finds out is in `RunState`.

    `started_at_s` is the monotonic time of its start. Until the API was queried, `preflight` is an offline one, and
    `budgets` allow nothing.
    """

    job: Job
    access: ApiAccess
    ledger: Database
    options: RunOptions
    environment: RunEnvironment
    signals: SignalHandler
    client: Client
    ledger_writer: LedgerWriter
    started_at_s: float
    preflight: Preflight
    #: What each step of the job may spend.
    budgets: tuple[Budget, ...]
    #: `policy.max_attempts` of each step of the job.
    max_attempts_by_step: Mapping[str, int]

    @property
    def budget(self) -> Budget:
        """What the only step may spend. Of a job with steps, the first one: all of them have the cap of the run."""
        return self.budgets[0]

    def steps(self) -> list[RunContext]:
        """Return the context of each step. A job without steps is one step."""
        steps = zip(self.job.steps, self.preflight.steps, self.budgets, strict=True)
        return [replace(self, job=job, preflight=preflight, budgets=(budget,)) for job, preflight, budget in steps]

    def elapsed_s(self) -> float:
        """Return the seconds since the start of the run."""
        return self.environment.clock.monotonic() - self.started_at_s

    def results_kept_since_ms(self) -> int:
        """Return the earliest time of submission (UTC, ms) whose results the API still keeps."""
        longest = max(step.model.policy.result_ttl for step in self.job.steps)
        return self.environment.clock.now_ms() - to_ms(longest)


class RunFiles(Struct, frozen=True):
    """The input, and the locations of the output and of the other files, by kind: `rejects`, `changes`."""

    job_input: JobInput
    target: Location
    extra_output_paths: Mapping[str, Location]
    #: The rows as the steps of the job see them; None: the job has no steps.
    step_rows: StepRows | None = None


def rescue_folders(job: Job) -> tuple[Path, ...]:
    """Return where a rescue file may be besides the ledger's folder: the output's (its undated part) and the job's."""
    job_folder = job.document.folder
    if not isinstance(job.output_path(datetime.now().astimezone()), Path):
        return (job_folder,)
    parts = Path(os.path.normpath(job.output_base / job.output.path)).parts
    dated = next((number for number, part in enumerate(parts) if "%" in part), len(parts))
    return (Path(*parts[: min(dated, len(parts) - 1)]), job_folder)


def find_job_rescue_files(job: Job) -> list[Path]:
    """Return the rescue files that the next run of a job imports. Raises CommandRefused when one is damaged."""
    return list(read_own_rescue_files(job.ledger, rescue_folders(job))) if isinstance(job.ledger, Path) else []


def check_ledger_exists(job: Job) -> None:
    """Raise CommandRefused when a job has never run, or only a rescue file has the data of its ledger."""
    if not ledger_exists(job.ledger):
        check_no_rescue_file(job)
        raise CommandRefused(f"{job.ledger}: no ledger, because this job has never run", "run it first: enrich run JOB")


def check_no_rescue_file(job: Job) -> None:
    """Raise CommandRefused when a rescue file has the data of a ledger that is missing."""
    if leftovers := find_job_rescue_files(job):
        raise CommandRefused(
            f"{job.ledger}: the ledger is missing, but {leftovers[0]} still has its data",
            "import it with `enrich run JOB --limit 0`, then run this again",
        )


def select_requests(job: Job, options: RunOptions, now_ms: int) -> RequestSelection:
    """Build the selection of requests from the job and the user's options.

    A saved plan is applied as of the time when it was made, so that it selects the same requests. If that is in the
    future, the clock was ahead, and results are not older than they are now.
    """
    plan = options.plan
    if plan is not None:
        now_ms = min(now_ms, plan.made_ms)
    refresh = job.model.policy.refresh
    ages = {State.FOUND: refresh.found, State.NOT_FOUND: refresh.not_found}
    return RequestSelection(
        retry=options.retry,
        refresh_before_ms={state: now_ms - to_ms(age) for state, age in ages.items() if age is not None},
        max_per_group=None if job.model.caps is None else job.model.caps.max,
        sample=options.sample,
        seed=options.seed,
        limit=options.limit,
        after_execution=None if plan is None else plan.after_execution,
    )


class ClusterCallbacks(Struct, frozen=True):
    """Callbacks of a run for a phase that a cluster does.

    `raise_if_stopped` is called often and may raise to stop the phase. `on_message` gets messages for the user. When
    `is_aborting` returns true, running work may finish, but work that has not begun is not waited for.
    """

    raise_if_stopped: Callable[[], None] = lambda: None
    on_message: Callable[[str], object] = lambda _: None
    is_aborting: Callable[[], bool] = lambda: False

    @classmethod
    def for_run(cls, run_state: RunState, raise_if_stopped: Callable[[], None]) -> ClusterCallbacks:
        """Return the callbacks for a phase in another thread. Call this in the event loop."""
        loop = asyncio.get_running_loop()
        return cls(
            raise_if_stopped, lambda text: loop.call_soon_threadsafe(run_state.add_note, text), run_state.abort.is_set
        )


class WorkerPool(Protocol):
    """Workers that submit and poll as one run."""

    @property
    def lost_reasons(self) -> Sequence[str]:
        """Why workers ended before their work was done."""

    async def run(self) -> None:
        """Submit and poll to the end. No worker is left when this returns."""

    def finish_early(self) -> None:
        """Poll each open task once more, now."""


class ClusterEngine(Protocol):
    """A cluster that enrolls, submits and polls, and collects. All its machines reach the ledger."""

    def make_worker_pool(
        self, run_state: RunState, work_config: WorkConfig, access: ApiAccess, requests: int
    ) -> WorkerPool | None:
        """Make the workers for `requests` requests. None: no workers are needed."""

    def enroll(
        self, job_input: JobInput, template: RequestTemplate, selection: RequestSelection, callbacks: ClusterCallbacks
    ) -> RowCounts:
        """Enroll all rows in a pass that was begun before."""

    def collect(
        self,
        job_input: JobInput,
        template: RequestTemplate,
        selection: RequestSelection,
        target: Location,
        callbacks: ClusterCallbacks,
    ) -> OutputCounts:
        """Write the output, which is a dataset."""
