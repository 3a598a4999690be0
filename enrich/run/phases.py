"""The phases of a run that talk to the API: collect open tasks, check before spending, submit and poll."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from math import inf

from msgspec.structs import replace

from enrich.errors import ApiCallFailed, RunCancelled
from enrich.exit_codes import ExitCode
from enrich.ledger import enroll, lease_table, queries, queue, records, resume, transitions
from enrich.ledger.database import Database
from enrich.models import State, Task, pluralize, read_balance, to_credits
from enrich.run import dispatcher
from enrich.run.background import out_of_time_error
from enrich.run.budget import Cost, check_balance, check_canary
from enrich.run.context import RunContext, RunFiles, select_requests
from enrich.run.enrolling import count_enrolled
from enrich.run.other_ledgers import check_neighbours
from enrich.run.plan import build_plan, format_plan, spend_question
from enrich.run.poller import Poller
from enrich.run.progress import Phase
from enrich.run.run_state import RunState, WorkConfig
from enrich.run.step_plan import format_steps_plan, plan_steps
from enrich.run.step_rows import StepRows

#: Limits for polling written-off tasks at the start, which is free: in seconds, and as a share of --max-time.
REPOLL_S, REPOLL_SHARE = 60.0, 0.1
#: How often the leases of lost workers are checked, in seconds.
LEASE_CHECK_EVERY_S = 0.5


async def collect_open_tasks(context: RunContext, run_state: RunState) -> None:
    """Poll every task that earlier runs left open once, nearest expiry first; then poll written-off tasks."""
    ledger_writer = context.ledger_writer
    if tasks := await ledger_writer.submit(resume.take_over_tasks):
        run_state.add_note(f"collecting {pluralize(len(tasks), 'task')} of an earlier run first")
        requests = sum(len(task.attempts) for task in tasks)
        average_price = await ledger_writer.submit(queries.average_price, context.preflight.template.target)
        reserved = await ledger_writer.submit(queries.open_reservations)
        likely = Cost.for_requests(requests, average_price, None).likely
        run_state.open_tasks_cost = Cost(likely, to_credits(reserved))
        poller = _make_poller(context, run_state)
        poller.poll_once_more = True
        poller.add_earlier_tasks(tasks)
        await run_state.run_until_abort(poller.run())
    max_time_s = context.options.max_time_s
    timeout_s = REPOLL_S if max_time_s is None else min(REPOLL_S, REPOLL_SHARE * max_time_s)
    tasks = await ledger_writer.submit(resume.written_off_tasks, context.results_kept_since_ms())
    await _repoll_written_off(context, run_state, tasks, timeout_s=timeout_s, to_be_resubmitted=False)


async def repoll_before_resubmitting(context: RunContext, run_state: RunState) -> None:
    """Poll the old tasks of requests to be resent (`--retry`). What cannot be polled now is not resent."""
    ledger_writer = context.ledger_writer
    tasks = await ledger_writer.submit(resume.written_off_tasks, 0, only_queued=True)
    queued = await ledger_writer.submit(queue.queued_count)
    unpolled = await _repoll_written_off(context, run_state, tasks, timeout_s=inf, to_be_resubmitted=True)
    if unpolled:
        run_state.add_note(f"{pluralize(len(unpolled), 'task')} could not be polled, so not sent again in this run")
        await ledger_writer.submit(
            resume.remove_from_queue, [attempt for task in unpolled for attempt in task.attempts]
        )
    if tasks:
        run_state.requests_to_submit -= queued - await ledger_writer.submit(queue.queued_count)
        await count_enrolled(context, run_state)


async def _repoll_written_off(
    context: RunContext, run_state: RunState, tasks: Sequence[Task], *, timeout_s: float, to_be_resubmitted: bool
) -> Sequence[Task]:
    """Poll tasks that were written off, which is free. Returns the tasks that could not be polled."""
    if not tasks or run_state.stop_polling.is_set():
        return tasks
    poller = _make_poller(context, run_state)
    poller.poll_once_more = not to_be_resubmitted
    poller.no_new_tasks = True
    poller.add_earlier_tasks(tasks, written_off=True, to_be_resubmitted=to_be_resubmitted)
    loop = asyncio.get_running_loop()
    timer = loop.call_later(timeout_s, poller.stop_repolling) if timeout_s < inf else None
    try:
        await run_state.run_until_abort(poller.run())
    finally:
        if timer is not None:
            timer.cancel()
    if poller.revived_requests:
        revived = pluralize(poller.revived_requests, "request")
        run_state.add_note(f"{revived} recovered: the API has the task after all")
    return poller.unpolled_tasks


async def check_before_spending(context: RunContext, run_state: RunState, files: RunFiles, number: int) -> None:
    """Refuse when the rescue file has no space, the balance is too low for one request, or the user declines.

    A step is checked before it sends anything: `number` counts from 0.
    """
    job, options, preflight = context.job, context.options, context.preflight
    to_submit = run_state.requests_to_submit
    if to_submit:
        context.ledger_writer.check_rescue_space()
        has_spent = run_state.counters.submitted > 0
        balance = await fetch_balance(context, run_state) if has_spent else preflight.balance
        check_balance(job, preflight.template, balance)
    if to_submit or (files.step_rows is not None and not number):
        await check_neighbours(context, run_state, files.step_rows, number)
    if not to_submit:
        return
    if options.confirm is not None and not await context.ledger_writer.submit(records.has_submitted, job.name):
        question = await context.ledger_writer.submit(_plan_and_question, context, run_state, files.step_rows)
        with context.signals.interruptible():
            agreed = options.confirm(question)
        if not agreed:
            raise RunCancelled


def _plan_and_question(ledger: Database, context: RunContext, run_state: RunState, step_rows: StepRows | None) -> str:
    if step_rows is not None:
        now_ms = run_state.clock.earliest_ms()
        selections = [
            replace(select_requests(step, context.options, now_ms), limit=None, sample=None)
            for step in step_rows.job_input.job.steps
        ]
        steps_plan = plan_steps(step_rows, ledger, context.preflight, selections, context.budget.cap)
        question = spend_question(steps_plan.cost.maximum, steps_plan.rows)
        return "\n".join([*format_steps_plan(steps_plan), question])
    plan = build_plan(context.job, context.preflight, ledger, run_state.read, context.budget.cap)
    return "\n".join([*format_plan(plan), spend_question(plan.cost.maximum, plan.to_submit)])


async def submit_and_poll(context: RunContext, run_state: RunState) -> None:
    """Submit the selected requests, and poll until all tasks are settled or the run has to end."""
    ledger_writer = context.ledger_writer
    if not run_state.stop_submitting.is_set():
        open_tasks = await ledger_writer.submit(transitions.submitted_tasks)
        open_requests = sum(len(task.attempts) for task in open_tasks)
        run_state.total_requests = run_state.counters.completed + run_state.requests_to_submit + open_requests
        if await _pass_canary(context, run_state):
            run_state.phase = Phase.SEND
            if not await _submit_and_poll_with_workers(context, run_state):
                await _submit_and_poll_locally(context, run_state)
    await ledger_writer.submit(resume.recover, run_state.clock.now_ms())
    if run_state.out_of_time:
        left = await ledger_writer.submit(enroll.enrolled_counts)
        if left.get(State.SUBMITTED) or await ledger_writer.submit(queue.queued_count):
            run_state.exit_reasons.setdefault(ExitCode.TIME, out_of_time_error())


async def _pass_canary(context: RunContext, run_state: RunState) -> bool:
    """Submit the rows of the job's canary, if it has one. Returns whether the rest may be submitted."""
    canary = context.job.model.canary
    if canary is None or run_state.new_requests <= canary.rows:
        return True
    run_state.phase = Phase.CANARY
    # Resent requests prove nothing: requests without a match last month will have none again.
    new_up_to = await context.ledger_writer.submit(queue.queue_position_of_new, canary.rows)
    if not await _submit_and_poll_locally(context, run_state, new_up_to):
        return False
    outcomes = await context.ledger_writer.submit(
        queries.execution_outcome_counts, run_state.execution_id, context.job.step or None
    )
    canary_error = check_canary(canary, outcomes, context.job.step)
    if not run_state.stop_submitting.is_set() and canary_error is not None:
        run_state.stop(ExitCode.CANARY, canary_error)
    return not run_state.stop_submitting.is_set()


async def _submit_and_poll_locally(context: RunContext, run_state: RunState, new_up_to: int | None = None) -> bool:
    """Submit and poll until all selected requests, or those of a canary, are settled.

    Returns False if the cap of the step left some unsent.
    """
    poller = _make_poller(context, run_state)
    await context.ledger_writer.submit(resume.take_over_tasks)
    poller.add_earlier_tasks(await context.ledger_writer.submit(transitions.submitted_tasks), polled_before=True)
    return await dispatcher.submit_and_poll(poller, new_up_to)


async def _submit_and_poll_with_workers(context: RunContext, run_state: RunState) -> bool:
    """Submit and poll with workers. Returns whether nothing is left to do in this process."""
    if (engine := context.environment.engine) is None:
        return False
    requests = run_state.requests_to_submit + len(await context.ledger_writer.submit(transitions.submitted_tasks))
    pool = engine.make_worker_pool(run_state, _work_config(context), context.access, requests)
    if pool is None:
        return False
    await context.ledger_writer.submit(resume.release_tasks)
    run_state.finish_polling = pool.finish_early
    await run_state.run_until_abort(pool.run())
    if pool.lost_reasons:
        await _settle_lost_workers(context, run_state, pool.lost_reasons)
    return not pool.lost_reasons


async def _settle_lost_workers(context: RunContext, run_state: RunState, lost_reasons: Sequence[str]) -> None:
    """Note that workers were lost, and wait until what they held is unconfirmed, or free for any poller."""
    counts = Counter(lost_reasons).items()
    lost = ", ".join(f"{count} times: {reason}" if count > 1 else reason for reason, count in counts)
    run_state.add_note(f"workers were lost ({lost}). Other workers took over their tasks")
    ledger_writer = context.ledger_writer
    while (others := await ledger_writer.submit(lease_table.other_holders)) and not run_state.stop_polling.is_set():
        remaining_s = max(other.remaining_s for other in others)
        await run_state.pause(min(max(remaining_s, 0.01), LEASE_CHECK_EVERY_S), run_state.stop_polling)
    await ledger_writer.submit(resume.recover, run_state.clock.now_ms())
    # A lost worker may have stored more results than it reported.
    counters, settled = run_state.counters, await ledger_writer.submit(queries.settled_counts, run_state.execution_id)
    counters.settled = dict(Counter(counters.settled) | Counter(settled))


def _work_config(context: RunContext) -> WorkConfig:
    model, preflight = context.job.model, context.preflight
    return WorkConfig(
        preflight.template.target,
        frozenset(model.params),
        context.budget,
        preflight.bound_to,
        model.dispatch.bulk,
        tuple(preflight.template.columns.values()),
        model.policy.max_attempts,
        model.policy.patience.total_seconds(),
        context.job.step or None,
        context.max_attempts_by_step,
    )


def _make_poller(context: RunContext, run_state: RunState) -> Poller:
    poller = Poller(run_state, context.ledger_writer, context.client, _work_config(context))
    run_state.finish_polling = poller.finish_early
    return poller


#: Seconds to wait for the balance. After that it is left out.
BALANCE_TIMEOUT_S = 5.0


async def fetch_balance(context: RunContext, run_state: RunState) -> int | None:
    """Fetch the balance. Returns None without a request when the run was stopped, or on failure."""
    if run_state.stop_polling.is_set() or context.signals.received is not None:
        return None
    try:
        async with asyncio.timeout(BALANCE_TIMEOUT_S):
            return read_balance((await context.client.get_user()).balance)
    except (ApiCallFailed, TimeoutError):
        return None
