"""The Python API: runs, plans and checks jobs as the command line does, also where an event loop is running."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_type_hints

from msgspec.structs import replace
from pydantic import ConfigDict, TypeAdapter, ValidationError

from enrich.commands.check import check_with_access
from enrich.commands.check_target import CheckResult
from enrich.commands.options import JobOptions, parse_file_path
from enrich.commands.plan import plan_with_access
from enrich.commands.run import RunCallbacks, check_combination, make_cluster_options, observe_run, run_observed
from enrich.errors import ApiCallFailed, ApiKeyRejected, ApiUnreachable, Interrupted, JobError
from enrich.exit_codes import ExitCode
from enrich.job.field_types import parse_duration
from enrich.job.job import Job
from enrich.ledger.verify import as_enrich_error
from enrich.models import RETRYABLE_STATES, State
from enrich.run.context import RunOptions
from enrich.run.plan import Plan
from enrich.run.plan_file import read_plan
from enrich.run.progress import Progress
from enrich.run.step_plan import StepsPlan
from enrich.run.summary import RunSummary

T = TypeVar("T")
StrPath = str | os.PathLike[str]


class JobSettings(TypedDict, total=False):
    """What is taken instead of the job file's values. Paths are relative to the working directory."""

    #: A file, a folder, a pattern or a URL.
    input: StrPath | None
    output: StrPath | None
    #: A file or `postgresql://…`.
    ledger: StrPath | None
    #: Use the built-in sandbox and a ledger of its own: no key, no credits.
    sandbox: bool


class PlanSettings(JobSettings, total=False):
    """Which requests are sent. All of them by default."""

    #: The most new requests that are sent.
    limit: int | None
    #: The number of new requests, spread over the whole file. Equal seeds choose equal rows.
    sample: int | None
    seed: int
    max_credits: float | None
    #: Send these again, which costs again: `failed`, `expired`, `in_doubt`.
    retry: Collection[str]
    #: Switch to the current default providers of the waterfall.
    update_providers: bool


class RunSettings(PlanSettings, total=False):
    """What `enrich run` has as options."""

    #: A plan that `plan_job(save_to=…)` or `enrich plan -o` saved.
    plan: StrPath | None
    #: Stop after this time: seconds, or a duration such as `5h`.
    max_time: float | str | None
    #: Mark unconfirmed requests as failed.
    accept_in_doubt: bool
    workspace_renamed: bool
    #: Pay again for what another ledger or an earlier output has.
    new_ledger: bool
    #: Seconds to wait for another run that holds the ledger. -1: without limit.
    lock_timeout: float
    engine: Literal["ray"] | None
    address: str | None
    workers: int | None
    log_file: StrPath | None
    #: Called often, in the thread of the run; by `run_job_async` in the event loop.
    on_progress: Callable[[Progress], object] | None
    #: Called with each message that the command line shows during a run.
    on_message: Callable[[str], object] | None


def run_job(job_file: StrPath, **settings: Unpack[RunSettings]) -> RunSummary:
    """Enrich the leads of a job; called again it resumes. The settings are those of `RunSettings`.

    Returns the summary of the run, whatever its exit code: see `exit_code` and `error`. Needs no confirmation.
    In the main thread without an event loop, SIGINT and SIGTERM stop the run as on the command line. With one (Jupyter,
    `asyncio.run`) the run has a thread of its own, and SIGINT stops it.

    Raises EnrichError if the run was refused before it was recorded, Interrupted if it was stopped. The next run
    resumes.
    """
    _check_settings(RunSettings, settings, job_file=job_file)
    return _outside_event_loop(partial(_run, job_file, **settings))


async def run_job_async(job_file: StrPath, **settings: Unpack[RunSettings]) -> RunSummary:
    """Enrich the leads of a job in a thread of its own: see `run_job`.

    When its task is cancelled, the run stores its results before CancelledError is raised.
    """
    _check_settings(RunSettings, settings, job_file=job_file)
    loop = asyncio.get_running_loop()

    def in_loop(callback: Callable[[T], object] | None) -> Callable[[T], object] | None:
        guarded = _guarded(callback)
        return None if callback is None else lambda value: loop.call_soon_threadsafe(guarded, value)

    settings["on_progress"] = in_loop(settings.get("on_progress"))
    settings["on_message"] = in_loop(settings.get("on_message"))
    stop: Future[None] = Future()
    executor = ThreadPoolExecutor(1, "enrich")
    run = loop.run_in_executor(executor, partial(_run, job_file, **settings), stop)
    executor.shutdown(wait=False)
    try:
        return await asyncio.shield(run)
    except asyncio.CancelledError:
        stop.set_result(None)
        while not run.done():
            with suppress(asyncio.CancelledError):  # cancelled again, while the run stores its results
                await asyncio.wait([run])
        run.exception()  # marks an error as read: asyncio logs the others
        raise


def plan_job(
    job_file: StrPath, *, save_to: StrPath | None = None, rows: StrPath | None = None, **settings: Unpack[PlanSettings]
) -> Plan | StepsPlan:
    """Return what a run would send and cost. Spends nothing.

    `save_to` saves the plan for `run_job(plan=…)`. `rows` is a file for each row's decision. Raises EnrichError for
    what would refuse the run.
    """
    _check_settings(PlanSettings, settings, job_file=job_file, save_to=save_to, rows=rows)
    return _outside_event_loop(lambda _: _plan(job_file, save_to, rows, settings))


def check_job(job_file: StrPath, *, online: bool = False, **settings: Unpack[JobSettings]) -> CheckResult:
    """Check a job before it runs: the input to its end, the paths, the ledger. Spends and changes nothing.

    With `online` the job is compared with the API, too. The problems are in the result, and so is the exit code that
    a run would have. Raises EnrichError if the job file cannot be read, or the API cannot be used.
    """
    _check_settings(JobSettings, settings, job_file=job_file, online=online)
    return _outside_event_loop(lambda _: _check(job_file, settings, online=online))


@cache
def _process_of_first_call() -> int:
    """Return its id. A fork after that lacks the threads of polars, and would wait for them."""
    return os.getpid()


def _check_settings(kind: type[JobSettings], settings: Mapping[str, Any], **own: object) -> None:
    """Raise TypeError for an unknown setting, JobError for a value of the wrong type or in a forked process."""
    if os.getpid() != _process_of_first_call():
        raise JobError(
            "this process was forked after a first call of enrich, which polars does not support",
            "start it with multiprocessing.get_context('spawn')",
        )
    declared = get_type_hints(kind)
    if unknown := settings.keys() - declared.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    optional_path = StrPath | None
    declared |= {"job_file": StrPath, "save_to": optional_path, "rows": optional_path, "online": bool}
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    for name, value in {**own, **settings}.items():
        try:
            TypeAdapter(declared[name], config=config).validate_python(value)
        except ValidationError as error:
            reasons = (problem["msg"].removeprefix("Input should be ") for problem in error.errors())
            raise JobError(f"`{name}` must be {' or '.join(reasons)}") from None


def _run(job_file: StrPath, stop: Future[None], **settings: Unpack[RunSettings]) -> RunSummary:
    job_options = _job_options(job_file, settings)
    on_message, on_progress = settings.get("on_message"), settings.get("on_progress")
    callbacks = RunCallbacks(_guarded(on_message), _guarded(on_progress), stop=stop)
    log_file = _optional_file("log_file", settings.get("log_file"))
    plan = _optional_file("plan", settings.get("plan"))
    with observe_run(job_options, log_file, callbacks.on_message) as observers:
        saved_plan = None if plan is None else read_plan(plan)
        max_credits = settings.get("max_credits")
        selected = replace(_selected(settings), plan=saved_plan, accept_in_doubt=settings.get("accept_in_doubt", False))
        check_combination(selected, max_credits)
        job = job_options.load(max_credits if saved_plan is None else saved_plan.max_credits)
        run_options = replace(
            selected,
            max_time_s=_seconds(settings.get("max_time")),
            workspace_renamed=settings.get("workspace_renamed", False),
            new_ledger=settings.get("new_ledger", False) or job.sandbox,
            cluster=make_cluster_options(job, settings.get("engine"), settings.get("address"), settings.get("workers")),
        )
        wait_s = settings.get("lock_timeout", 0)
        summary = _with_enrich_errors(job, lambda: run_observed(job, run_options, wait_s, observers, callbacks))
    if summary.exit_code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        raise Interrupted(ExitCode(summary.exit_code))
    return summary


def _plan(job_file: StrPath, save_to: StrPath | None, rows: StrPath | None, settings: PlanSettings) -> Plan | StepsPlan:
    selected = _selected(settings)
    job = _job_options(job_file, settings).load(settings.get("max_credits"))
    plan_file, rows_file = _optional_file("save_to", save_to), _optional_file("rows", rows)
    plan, note = _with_enrich_errors(job, lambda: plan_with_access(job, selected, plan_file, rows_file))
    if note is not None:
        logging.getLogger("enrich").warning(note)
    return plan


def _check(job_file: StrPath, settings: JobSettings, *, online: bool) -> CheckResult:
    job = _job_options(job_file, settings).load()
    return _with_enrich_errors(job, lambda: check_with_access(job, online=online))


def _file(name: str, path: StrPath) -> Path:
    """Return the path of a file. Raises JobError for a name that no file can have."""
    try:
        return parse_file_path(os.fspath(path))
    except ValueError as error:
        raise JobError(f"`{name}`: {error}") from error


def _optional_file(name: str, path: StrPath | None) -> Path | None:
    return None if path is None else _file(name, path)


def _job_options(job_file: StrPath, settings: JobSettings) -> JobOptions:
    paths = (settings.get("input"), settings.get("output"), settings.get("ledger"))
    input_path, output, ledger = (None if path is None else os.fspath(path) for path in paths)
    return JobOptions(_file("job_file", job_file), input_path, output, ledger, settings.get("sandbox", False))


def _selected(settings: PlanSettings) -> RunOptions:
    """Return which requests are sent. Raises JobError for a number that is out of range."""
    limit, sample, max_credits = settings.get("limit"), settings.get("sample"), settings.get("max_credits")
    for name, value, least in (("limit", limit, 0), ("sample", sample, 1), ("max_credits", max_credits, 0)):
        if value is not None and not value >= least:
            raise JobError(f"`{name}` must be {least} or more, not {value}")
    return RunOptions(
        limit=limit,
        sample=sample,
        seed=settings.get("seed", 0),
        retry=_states(settings.get("retry", ())),
        update_providers=settings.get("update_providers", False),
    )


def _states(names: Collection[str]) -> frozenset[State]:
    allowed = ", ".join(filter(RETRYABLE_STATES.__contains__, State))
    if isinstance(names, str):
        raise JobError(f"`retry` must be a list of states ({allowed}), not text")
    for name in names:
        if name not in RETRYABLE_STATES:
            raise JobError(f"`retry`: `{name}` must be one of {allowed}")
    return frozenset(map(State, names))


def _seconds(duration: float | str | None) -> float | None:
    if not isinstance(duration, str):
        if duration is not None and not duration >= 0:
            raise JobError(f"`max_time` must be 0 or more seconds, not {duration}")
        return duration
    try:
        return parse_duration(duration).total_seconds()
    except ValueError as error:
        raise JobError(f"`max_time`: {error}") from error


def _with_enrich_errors(job: Job, work: Callable[[], T]) -> T:
    """Do the work. Raise a public EnrichError for what the API refuses, and the ledger's file or server causes."""
    try:
        return work()
    except ApiCallFailed as error:
        public = {ExitCode.KEY: ApiKeyRejected, ExitCode.USAGE: JobError}.get(error.exit_code, ApiUnreachable)
        raise public(error.message, error.hint) from error
    except Exception as error:
        known = as_enrich_error(error, job.ledger)
        if known is None or known is error:
            raise
        raise known from error


def _outside_event_loop(work: Callable[[Future[None]], T]) -> T:
    """Do the work here or, if this thread runs an event loop (as in Jupyter), in another thread. `stop` ends a run."""
    stop: Future[None] = Future()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work(stop)
    with _stopped_by_sigint(stop), ThreadPoolExecutor(1, "enrich") as executor:
        try:
            result = executor.submit(work, stop).result()
        except BaseException:  # perhaps of another signal's handler: the executor waits for the end of the work
            _end_work(stop)
            raise
    if stop.done():  # too late to end the work
        raise KeyboardInterrupt
    return result


def _end_work(stop: Future[None]) -> None:
    with suppress(InvalidStateError):
        stop.set_result(None)


@contextmanager
def _stopped_by_sigint(stop: Future[None]) -> Iterator[None]:
    """Let SIGINT set `stop`, if this is the main thread.

    The usual handler raises an exception, perhaps before `result` is called. That of `asyncio.run` waits for the loop,
    which is blocked.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: _end_work(stop))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _guarded(callback: Callable[[T], object] | None) -> Callable[[T], None]:
    """Return a callback that cannot end a run: the first exception is logged, and ends the calls."""
    is_active = callback is not None

    def call(value: T) -> None:
        nonlocal is_active
        if is_active and callback is not None:
            try:
                callback(value)
            except (Exception, SystemExit):
                is_active = False
                logging.getLogger("enrich").exception("a callback of the run failed and is not called again")

    return call
