"""One execution from the open ledger to the receipt: what it begins with, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from enrich.api.client import Client
from enrich.budget import Budget, afford
from enrich.connect import Connection, Memory, check_host, connect, recall, unconnected
from enrich.desk import Desk
from enrich.earlier_output import paid_elsewhere
from enrich.errors import LOCKED_HINT, EnrichError, Exit, Interrupted, LedgerLocked, OtherWorkspace, Refused
from enrich.execution import Execution
from enrich.heartbeat import Heartbeat
from enrich.pace import Pace
from enrich.place import Place
from enrich.polls import PollTimes
from enrich.pulse import Doing
from enrich.receipt import Receipt
from enrich.rows import Rows
from enrich.signals import Signals
from enrich.store.holding import Owner
from enrich.store.journal import LOCKED_S, Journal
from enrich.store.ledger import Ledger
from enrich.store.rescue import remove_taken, take_in_files
from enrich.store.rescue_file import RescueFile
from enrich.store.sqlite import damaged
from enrich.surroundings import Options, Surroundings, rescue_folders
from enrich.tables.writing import prepare

T = TypeVar("T")
#: How often it is looked whether others are gone.
LOOK_AGAIN_S = 0.5


def run(around: Surroundings, options: Options) -> Receipt:
    """Run a job; the caller holds the lock of its ledger.

    Raises EnrichError for what went wrong before an execution came to be.
    """
    return asyncio.run(_run(around, options))


async def _run(around: Surroundings, options: Options) -> Receipt:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - asyncio.run made it
    signals = Signals(on_first=lambda _: task.cancel())
    timing = around.timing
    try:
        with signals.handled():
            client = Client(around.access, around.clock, post_s=timing.post_s, get_s=timing.get_s)
            async with client, _journal(around) as journal:
                return await _execute(around, options, signals, client, journal)
    except asyncio.CancelledError:
        signals.check()
        raise


def _journal(around: Surroundings) -> Journal:
    """Open the journal; what a file does not take goes into a rescue file beside it."""
    place = around.ledger.place
    if not isinstance(place, Path):
        return Journal(around.ledger)
    rescue = partial(RescueFile, place, rescue_folders(around.job))
    journal = Journal(around.ledger, rescue=rescue, lock_patience_s=LOCKED_S)
    journal.on_wait = around.tell
    return journal


async def _take_in_rescued(around: Surroundings, journal: Journal) -> list[str]:
    """Take in what an earlier run could not write into the ledger; return it in words.

    Raises Refused for a rescue file that is damaged.
    """
    job = around.job
    taken = await journal.do(take_in_files, rescue_folders(job), job.name, around.clock.now_ms())
    return [f"{path} was taken in: {what}" for path, what in remove_taken(taken)]


async def _execute(
    around: Surroundings, options: Options, signals: Signals, client: Client, journal: Journal
) -> Receipt:
    job, clock = around.job, around.clock
    started = clock.monotonic()
    await _others_gone(around, journal)
    refusals = Refusals(around, journal)
    rescued = await refusals.attempt(_take_in_rescued(around, journal)) or []
    doubtful = await journal.do(Ledger.recover, clock.now_ms())
    memory = await journal.do(recall, job.model.waterfall)
    check_host(memory, job, around.access.host)
    files = await refusals.attempt(_open_files(around, signals, journal))
    await refusals.attempt(_check_new_ledger(around, options, signals, journal, rescued))
    found = await refusals.attempt(_connect(around, options, client, journal, memory, files))
    desk = await _begin(around, options, signals, client, journal, found, refusals, started)
    connection = desk.connection
    execution = desk.execution
    if doubtful:
        desk.note(f"{doubtful} requests were on the wire when the last execution was killed: now in doubt")
    for note in [*rescued, *connection.notes]:
        desk.note(note)
    with _besides(desk.keep_time(), desk.heart.beat(), desk.keep_learned()):
        try:
            await desk.rescue()
            if refusals.errors or files is None:
                raise refusals.errors[0]
            desk.feeds = files.feeds
            return await desk.work(files.rows, files.target)
        except (EnrichError, JSONDecodeError) as failure:
            reason = failure if isinstance(failure, EnrichError) else damaged(job.ledger)
            code = reason.exit_code
            if code is Exit.REFUSED and execution.tally.submitted:
                code = Exit.BUG  # 5 promises that nothing was spent
            execution.reasons.setdefault(code, reason)
            await desk.heart.begin(Doing.COLLECT)
            return await desk.finish(execution.exit_code({}))


async def _others_gone(around: Surroundings, journal: Journal) -> None:
    """Wait until no process of an earlier execution is at work; in a file none can be.

    Raises LedgerLocked when one leads an execution and lives: the server lost its lock when it was restarted.
    """
    told: dict[int, Owner] = {}
    while others := await journal.do(Ledger.others):
        left_s = max(other.left_s for other in others)
        if not told:
            around.tell(f"an earlier run left processes behind: waiting {left_s:.0f} s at most until their leases end")
        for other in others:
            if other.leads and other.until_s > told.setdefault(other.id, other).until_s:
                raise LedgerLocked(f"{around.job.ledger}: another execution is at work: {other.name}", LOCKED_HINT)
        if not others[0].leads:
            await journal.do(Ledger.end_lease_of, others)
        await asyncio.sleep(min(max(left_s, 0.01), LOOK_AGAIN_S))


@contextmanager
def _besides(*loops: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Let loops run for as long as the block."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


@dataclass(frozen=True, slots=True)
class Files:
    """The input, and where the output and the files beside it go."""

    rows: Rows
    target: Place
    feeds: Mapping[str, Place]


async def _open_files(around: Surroundings, signals: Signals, journal: Journal) -> Files:
    """Open the input and prepare the places of all files. Raises EnrichError when one of them cannot be used."""
    job, now = around.job, datetime.now().astimezone()
    job.report_path(now)
    target, feeds = job.output_path(now), job.feeds(now)
    forgotten = await journal.do(Ledger.forgotten)
    with signals.asking():  # a pipe or a storage may let us wait
        for kind, place in {"output": target, **feeds}.items():
            prepare(place, job.input_path, job.name, kind)
        return Files(Rows(job, forgotten), target, feeds)


async def _connect(  # noqa: PLR0913, PLR0917 - all of them are needed once
    around: Surroundings, options: Options, client: Client, journal: Journal, memory: Memory, files: Files | None
) -> Connection:
    """Ask the API what a run must know. Raises EnrichError when job, input, API and ledger do not fit together."""
    job = around.job
    connection = await connect(
        client,
        memory,
        job,
        around.access.host,
        at_most_s=around.timing.start_s,
        update_providers=options.update_providers,
        workspace_renamed=options.workspace_renamed,
    )
    workspace = connection.bound_to["workspace"]
    if options.workspace_renamed and workspace is not None:
        await journal.do(Ledger.rename_workspace, workspace)
    if files is not None:
        files.rows.check_new_columns(connection.question)
    return connection


@dataclass(slots=True)
class Refusals:
    """What refuses a run. Each is kept until what was paid for is collected; without such it is raised at once."""

    around: Surroundings
    journal: Journal
    errors: list[EnrichError] = field(default_factory=list)

    async def attempt(self, work: Awaitable[T]) -> T | None:
        """Do a part of the preparations; None when it refuses the run."""
        try:
            return await work
        except Interrupted:
            raise
        except EnrichError as error:
            if not await self.journal.do(_is_open, self.around):
                raise
            self.errors.append(error)
            return None


def _is_open(ledger: Ledger, around: Surroundings) -> bool:
    """Tell whether the API may have an answer that was paid for."""
    return bool(ledger.tasks() or ledger.written_off(around.asked_since()))


async def _check_new_ledger(
    around: Surroundings, options: Options, signals: Signals, journal: Journal, notes: list[str]
) -> None:
    """Raise Refused for a new ledger when an earlier output was paid for from another one, unless the person agrees."""
    if options.new_ledger or await journal.do(Ledger.has_accepted):
        return
    output, note = await paid_elsewhere(around.job, journal, signals.asking)
    notes += [note] if note is not None else []
    if output is None:
        return
    said = (
        f"{output} was paid for from another ledger: with the new ledger {around.job.ledger} its leads are paid again"
    )
    refused = Refused(said, "name the ledger that paid in `ledger:`, or restore it; --new-ledger pays again")
    if options.confirm_new_ledger is not None:
        with signals.asking():
            if options.confirm_new_ledger(said):
                return
        refused = Refused("cancelled: nothing was sent")
    raise refused


async def _begin(  # noqa: PLR0913, PLR0917 - all of them are needed once
    around: Surroundings,
    options: Options,
    signals: Signals,
    client: Client,
    journal: Journal,
    found: Connection | None,
    refusals: Refusals,
    started: float,
) -> Desk:
    """Write down that an execution begins, with the budget that it has; without a connection it only collects."""
    job, clock = around.job, around.clock
    connection = found or unconnected(job)
    if found is None:
        budget = Budget(0, 0, refusals.errors[0].message, refusals.errors[0].hint or "")
    else:
        plan = None if options.plan is None else (options.plan.to_submit, options.plan.after_execution)
        budget, refused = await journal.do(afford, job, connection.question, connection.balance, plan)
        refusals.errors += [refused] if refused is not None else []
        waterfall = connection.waterfall
        await journal.do(Ledger.remember_waterfall, waterfall.identifier, waterfall.model_dump(), connection.providers)
    question = connection.question
    number = await journal.do(
        Ledger.start_execution,
        job.name,
        budget.cap,
        clock.now_ms(),
        connection.balance,
        list(question.columns.values()),
    )
    limits = job.model.limits
    execution = Execution(
        number,
        clock,
        Pace(limits.requests_per_second),
        around.timing,
        in_flight_limit=limits.in_flight,
        result_ttl_s=job.model.policy.result_ttl.total_seconds(),
        holds=around.holds,
        poll_times=PollTimes(await journal.do(Ledger.latencies, question.call, job.model.dispatch.bulk)),
    )
    heart = Heartbeat(around, execution, journal, started)
    desk = Desk(around, options, signals, client, journal, connection, execution, budget, heart, started)
    desk.answers_only = any(isinstance(error, OtherWorkspace) for error in refusals.errors)
    signals.on_first = desk.interrupt
    journal.on_failure = desk.ledger_failed
    return desk
