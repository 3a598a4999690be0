"""`enrich cancel`: cancels the tasks of a job that are running at Databar, and records what that refunds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import click
from msgspec import Struct
from msgspec.structs import asdict, replace

from enrich.commands import options
from enrich.commands.streams import echo_error
from enrich.databar.client import Client
from enrich.databar.clock import Clock, SystemClock
from enrich.databar.environment import ApiAccess
from enrich.databar.task_results import (
    TaskPhase,
    TaskReply,
    is_cancelled,
    is_incomplete,
    parse_price,
    read_answer,
    task_phase,
)
from enrich.errors import (
    ApiUnreachable,
    EnrichError,
    InvalidPollResponse,
    OutOfCredits,
    RequestRefused,
    TaskFinished,
    TaskUnknown,
    Unauthorized,
)
from enrich.exit_codes import ExitCode
from enrich.job.job import Job
from enrich.ledger import lease_table, records, rescue_import, resume, transitions
from enrich.ledger.database import Database
from enrich.ledger.lock import lock_ledger, open_for_run
from enrich.models import Answer, State, Task, format_credits, pluralize, read_balance, to_credits
from enrich.run.context import check_ledger_exists, rescue_folders
from enrich.run.preflight import check_api_host, check_workspace, read_binding, retry_until
from enrich.run.run_state import Timeouts
from enrich.run.summary import RunSummary

#: The error of a request whose task was cancelled by this command.
CANCELLED = "cancelled by you"
#: Errors that concern one task. The other tasks are tried, too.
TASK_ERRORS = (RequestRefused, OutOfCredits, InvalidPollResponse)
CONCURRENT_TASKS = 8


class CancelSummary(Struct, frozen=True):
    """What became of the single tasks that were open.

    `credits_refunded` is what was reserved for the cancelled ones, less what the API charged. `finished` ones had an
    answer already, which was stored. `credits_unknown` counts those of both whose price is unknown. `still_open` ones
    are collected by the next run. `bulk` lists the bulk tasks; they are never cancelled.
    """

    job: str
    exit_code: int = int(ExitCode.OK)
    execution: int | None = None
    cancelled: int = 0
    credits_refunded: float = 0.0
    finished: int = 0
    credits_spent: float = 0.0
    credits_unknown: int = 0
    still_open: int = 0
    bulk: Sequence[dict[str, Any]] = ()
    balance_before: float | None = None
    balance_after: float | None = None
    error: str | None = None
    hint: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {name: value for name, value in asdict(self).items() if name not in ("error", "hint") or value}


def cancel_tasks(job: Job, access: ApiAccess, ledger: Database, clock: Clock) -> CancelSummary:
    """Cancel the single tasks of a job that wait for their answer, under the ledger's lock. Raises EnrichError."""
    rescue_import.import_and_remove(ledger, rescue_folders(job), job.name, clock.now_ms())
    with ledger.transaction():
        lease_table.check_no_other_holders(ledger)
        resume.recover(ledger, clock.now_ms())
    return asyncio.run(_cancel_tasks(job, access, ledger, clock))


async def _cancel_tasks(job: Job, access: ApiAccess, ledger: Database, clock: Clock) -> CancelSummary:
    with ledger.transaction():
        binding, tasks = read_binding(ledger, job), transitions.open_tasks_of(ledger, job.name)
    check_api_host(binding, access.host)
    bulk = [{"task_id": task.task_id, "requests": len(task.attempts)} for task in tasks if task.bulk_task_id]
    singles = [task for task in tasks if task.bulk_task_id is None]
    summary = CancelSummary(job.name, bulk=bulk)
    if not singles:
        return summary
    async with Client(access, clock) as client:
        user = await retry_until(client.get_user, Timeouts().startup_s)
        check_workspace(binding, user)
        balance = read_balance(user.balance)
        with ledger.transaction():
            paths = list(singles[0].column_paths)
            execution_id = records.start_execution(ledger, job.name, None, clock.now_ms(), balance, paths)
        canceller = _Canceller(job, client, ledger, clock, execution_id)
        error = await canceller.run(singles)
        balance_after = None  # also when the API does not answer any more
        with suppress(EnrichError):
            balance_after = read_balance((await client.get_user()).balance)
    closed = canceller.closed
    refunds = [max(0, each.reserved - each.cost) for each in closed if each.is_cancelled and each.cost is not None]
    cancelled = sum(each.is_cancelled for each in closed)
    summary = replace(
        summary,
        execution=execution_id,
        cancelled=cancelled,
        credits_refunded=to_credits(sum(refunds)),
        finished=len(closed) - cancelled,
        credits_spent=to_credits(sum(each.cost or 0 for each in closed)),
        credits_unknown=sum(each.cost is None for each in closed),
        still_open=len(singles) - len(closed),
        balance_before=to_credits(balance),
        balance_after=to_credits(balance_after),
        exit_code=int(ExitCode.OK if error is None else error.exit_code),
        error=None if error is None else f"tasks were not cancelled: {error.message}",
        hint=None if error is None else error.hint,
    )
    with ledger.transaction():
        if records.delete_unless_used(ledger, execution_id):
            return replace(summary, execution=None)
        run_summary = RunSummary(
            job.name,
            summary.exit_code,
            execution=execution_id,
            credits_spent=summary.credits_spent,
            credits_unknown=summary.credits_unknown,
            answers=sum(each.is_settled for each in closed),
            balance_before=summary.balance_before,
            balance_after=summary.balance_after,
            sandbox=job.sandbox,
            notes=[f"{pluralize(cancelled, 'task')} cancelled by enrich cancel"],
        )
        record = run_summary.as_json() | {"command": records.CANCEL}
        records.end_execution(ledger, execution_id, summary.exit_code, record, clock.now_ms(), balance_after)
    return summary


async def _retry(call: Callable[[], Awaitable[TaskReply]]) -> TaskReply:
    return await retry_until(call, Timeouts().startup_s, final_errors=(Unauthorized, *TASK_ERRORS))


class _ClosedTask(NamedTuple):
    """A task that is not open any more: cancelled, or else finished. Credits in millionths; `cost` None: unknown.

    `is_settled`: its request is settled, too. Otherwise it has failed at no charge, and the next run sends it again.
    """

    is_cancelled: bool
    is_settled: bool
    cost: int | None
    reserved: int


@dataclass(slots=True)
class _Canceller:
    """Cancels tasks, and lists those that are not open any more."""

    job: Job
    client: Client
    ledger: Database
    clock: Clock
    execution_id: int
    closed: list[_ClosedTask] = field(default_factory=list)

    async def run(self, tasks: Sequence[Task]) -> EnrichError | None:
        """Cancel the tasks, a few at a time. Returns the error that ended it early, or else the first of a task."""
        task_error: EnrichError | None = None
        rate = self.job.model.limits.requests_per_second
        for start in range(0, len(tasks), CONCURRENT_TASKS):
            group = tasks[start : start + CONCURRENT_TASKS]
            results = await asyncio.gather(*map(self._cancel, group), return_exceptions=True)
            for result in results:
                if isinstance(result, ApiUnreachable | Unauthorized):
                    return result
                if isinstance(result, TASK_ERRORS):
                    task_error = task_error or result
                elif isinstance(result, BaseException) and not isinstance(result, TaskUnknown):
                    raise result
            if rate is not None:
                await asyncio.sleep(len(group) / rate)
        return task_error

    async def _cancel(self, task: Task) -> None:
        """Cancel one task. Poll it if it is already finished (409), or if the response cannot be read."""
        unread: InvalidPollResponse | None = None
        try:
            reply = await _retry(lambda: self.client.cancel_task(task.task_id))
        except (TaskFinished, InvalidPollResponse) as error:
            unread = error if isinstance(error, InvalidPollResponse) else None
            reply = await _retry(lambda: self.client.poll_task(task.task_id, new_connection=True))
        phase = task_phase(reply.body)
        if is_cancelled(reply.body):
            cost = parse_price(reply.body.get("credits_spent"))
            self._settle(task, Answer(State.FAILED, CANCELLED, credits=cost, raw=reply.raw), is_cancelled=True)
        elif phase is TaskPhase.FAILED or (phase is TaskPhase.COMPLETED and not is_incomplete(reply.body)):
            self._settle(task, read_answer(reply, phase, task.column_paths))
        elif unread is not None:
            raise unread

    def _settle(self, task: Task, answer: Answer, *, is_cancelled: bool = False) -> None:
        with self.ledger.transaction():
            max_attempts = self.job.max_attempts_by_step.get(task.step, self.job.model.policy.max_attempts)
            updates = [(task.attempts[0], answer, self.clock.now_ms())]
            (state,) = transitions.settle(self.ledger, updates, self.execution_id, max_attempts)
        self.closed.append(_ClosedTask(is_cancelled, state is not State.PENDING, answer.credits, task.reserved))


def format_cancel(job: Job, summary: CancelSummary, run_args: str) -> Iterator[str]:
    """Yield the summary as lines of text. `run_args` are the arguments of `enrich run` for this job and ledger."""
    at_least = "at least " if summary.credits_unknown else ""
    refund = f": {at_least}{format_credits(summary.credits_refunded)} credits refunded" if summary.cancelled else ""
    yield f"{job.title}: {pluralize(summary.cancelled, 'task')} cancelled{refund}"
    if summary.finished:
        spent = f"{at_least}{format_credits(summary.credits_spent)}"
        yield f"  {pluralize(summary.finished, 'task')} had finished: results stored ({spent} credits)"
    if summary.credits_unknown:
        yield f"  {pluralize(summary.credits_unknown, 'result')} of unknown price"
    if summary.still_open:
        yield f"  {pluralize(summary.still_open, 'task')} still running: the next run collects the results"
    for task in summary.bulk:
        yield f"  not cancelled: bulk task {task['task_id']} ({pluralize(task['requests'], 'request')})"
    if summary.cancelled:
        yield f"  The leads are now failed. Send them again: enrich run {run_args} --retry failed"


@click.command()
@options.job_options(sandbox="Cancel the tasks of the sandbox.")
@options.JSON_OPTION
def cancel(job_options: options.JobOptions, as_json: bool) -> int:
    """Cancel the tasks of JOB that are running at Databar, and print the refund.

    Their leads become `failed` and are sent again only by --retry failed. Bulk tasks are listed, not cancelled.
    """
    job = job_options.load()
    check_ledger_exists(job)
    with ExitStack() as stack:
        stack.enter_context(lock_ledger(job.ledger, 0))
        access = stack.enter_context(options.open_access(job, use_sandbox=job_options.use_sandbox))
        ledger, lease = stack.enter_context(open_for_run(job.ledger))
        summary = cancel_tasks(job, access, ledger, lease or SystemClock())
    if summary.error:
        echo_error(summary.error, summary.hint)
    run_args = job_options.arguments(as_typed=True).run_args
    options.echo_result(summary.as_json(), format_cancel(job, summary, run_args), as_json=as_json)
    return summary.exit_code
