"""One execution from the open ledger to the receipt: what it begins with, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

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
    rescued = await _take_in_rescued(around, journal)
    doubtful = await journal.do(Ledger.recover, clock.now_ms())
    memory = await journal.do(recall, job.model.waterfall)
    check_host(memory, job, around.access.host)
    now = datetime.now().astimezone()
    target, feeds = job.output_path(now), job.feeds(now)
    rows = await _open_input(around, signals, journal, {"output": target, **feeds})
    new_ledger = await _check_new_ledger(around, options, signals, journal, rescued)
    connection = await _connect(around, options, client, journal, memory)
    if isinstance(rows, Rows) and isinstance(connection, Connection):
        try:
            rows.check_new_columns(connection.question)
        except EnrichError as error:
            if not await journal.do(_is_open, around):
                raise
            rows = error
    desk, refused = await _begin(around, options, signals, client, journal, connection, started)
    refused = new_ledger or refused
    desk.feeds = feeds
    connection = desk.connection
    execution = desk.execution
    if doubtful:
        desk.note(f"{doubtful} requests were on the wire when the last execution was killed: now in doubt")
    for note in [*rescued, *connection.notes]:
        desk.note(note)
    with _besides(desk.keep_time(), desk.heart.beat(), desk.keep_learned()):
        try:
            await desk.rescue()
            for problem in (refused, rows):
                if isinstance(problem, EnrichError):
                    raise problem
            assert isinstance(rows, Rows)  # noqa: S101 - the problem would have been raised
            return await desk.work(rows, target)
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


async def _open_input(
    around: Surroundings, signals: Signals, journal: Journal, targets: Mapping[str, Place]
) -> Rows | EnrichError:
    """Open tonight's files. What is wrong with them waits when there is something to collect.

    What was paid for is fetched even when tonight's file is broken; more is not bought.
    """
    job = around.job
    try:
        forgotten = await journal.do(Ledger.forgotten)
        with signals.asking():  # a pipe or a storage may let us wait
            for kind, place in targets.items():
                prepare(place, job.input_path, job.name, kind)
            return Rows(job, forgotten)
    except Interrupted:
        raise
    except EnrichError as error:
        if not await journal.do(_is_open, around):
            raise
        return error


async def _connect(
    around: Surroundings, options: Options, client: Client, journal: Journal, memory: Memory
) -> Connection | EnrichError:
    """Ask the API what a run must know. What goes wrong waits when there is something to collect."""
    job = around.job
    try:
        connection = await connect(
            client,
            memory,
            job,
            around.access.host,
            at_most_s=around.timing.start_s,
            update_providers=options.update_providers,
            workspace_renamed=options.workspace_renamed,
        )
    except EnrichError as error:
        if not await journal.do(_is_open, around):
            raise
        return error
    workspace = connection.bound_to["workspace"]
    if options.workspace_renamed and workspace is not None:
        await journal.do(Ledger.rename_workspace, workspace)
    return connection


def _is_open(ledger: Ledger, around: Surroundings) -> bool:
    """Tell whether the API may have an answer that was paid for."""
    return bool(ledger.tasks() or ledger.written_off(around.asked_since()))


async def _check_new_ledger(
    around: Surroundings, options: Options, signals: Signals, journal: Journal, notes: list[str]
) -> Refused | None:
    """Refuse a new ledger when an earlier output was paid for from another one, unless the person agrees.

    What a rescue file brought is collected first; then the refusal is returned.
    """
    if options.new_ledger or await journal.do(Ledger.has_accepted):
        return None
    output, note = await paid_elsewhere(around.job, journal, signals.asking)
    notes += [note] if note is not None else []
    if output is None:
        return None
    said = (
        f"{output} was paid for from another ledger: with the new ledger {around.job.ledger} its leads are paid again"
    )
    refused = Refused(said, "name the ledger that paid in `ledger:`, or restore it; --new-ledger pays again")
    if options.confirm_new_ledger is not None:
        with signals.asking():
            if options.confirm_new_ledger(said):
                return None
        refused = Refused("cancelled: nothing was sent")
    if not await journal.do(_is_open, around):
        raise refused
    return refused


async def _begin(  # noqa: PLR0913, PLR0917 - all of them are needed once
    around: Surroundings,
    options: Options,
    signals: Signals,
    client: Client,
    journal: Journal,
    found: Connection | EnrichError,
    started: float,
) -> tuple[Desk, EnrichError | None]:
    """Write down that an execution begins, with the budget that it has, or why it can have none."""
    job, clock = around.job, around.clock
    refused: EnrichError | None
    if isinstance(found, EnrichError):
        connection, refused = unconnected(job), found
        budget = Budget(0, 0, found.message, found.hint or "")
    else:
        connection = found
        plan = None if options.plan is None else (options.plan.to_submit, options.plan.after_execution)
        budget, refused = await journal.do(afford, job, connection.question, connection.balance, plan)
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
    desk.answers_only = isinstance(found, OtherWorkspace)
    signals.on_first = desk.interrupt
    journal.on_failure = desk.ledger_failed
    return desk, refused
