"""The steps of one execution: rescue, enroll, dispatch and poll side by side, collect."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any

from enrich.databar.client import Client
from enrich.errors import OUTPUT_WRITING_CODES, CommandRefused, EnrichError, ExitCode, Interrupted, LedgerFailed
from enrich.job.locations import Location, is_dataset
from enrich.ledger.ledger import Ledger
from enrich.ledger.writer import LedgerWriter
from enrich.models import DECISIONS_TO_SEND, Decision, RequestSelection, RowStatus, State, Task, pluralize, to_credits
from enrich.rows.reader import JobInput
from enrich.run.budget import Budget, check_balance, check_canary
from enrich.run.cluster import ClusterCallbacks, ClusterEngine, EnrollCounts, WorkerPool
from enrich.run.collector import Collector, OutputCounts, write_changes, write_rejects
from enrich.run.context import RunContext, RunOptions, select_requests
from enrich.run.loops import WorkConfig
from enrich.run.plan import Cost, Plan, build_plan, format_plan
from enrich.run.plan_file import check_plan, gather_plan_inputs
from enrich.run.poller import Poller
from enrich.run.preflight import Preflight
from enrich.run.progress import Phase, ProgressReporter
from enrich.run.signals import SignalHandler
from enrich.run.state import RunState
from enrich.run.summary import RunFinisher, RunSummary

#: How often it is written down what was learned: a kill loses no more.
SAVE_LATENCIES_EVERY_S = 30.0
#: Counting the rows for the receipt of an interrupted run must not hold up its exit.
MAX_ROWS_WHEN_INTERRUPTED = 100_000
#: How often the leases of lost workers are checked, in seconds.
LEASE_CHECK_EVERY_S = 0.5
#: Requests whose answer is reused.
REUSED_STATES = (State.FOUND, State.NOT_FOUND, State.FAILED)
#: The share of --max-time that is kept at most for collecting what was submitted.
COLLECT_TIME_SHARE = 0.2
#: The longest time in seconds for free questions at the start, and their largest share of --max-time.
REPOLL_S, REPOLL_SHARE = 60.0, 0.1


@dataclass(slots=True)
class RunPhases:
    """The steps of one execution that has a connection."""

    context: RunContext
    options: RunOptions
    signals: SignalHandler
    client: Client
    ledger_writer: LedgerWriter
    preflight: Preflight
    run_state: RunState
    budget: Budget
    progress: ProgressReporter
    started_at_s: float = 0.0
    #: Where the files beside the output go.
    extra_output_paths: Mapping[str, Location] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: What was written there.
    extra_output_summary: dict[str, Any] = field(default_factory=dict)
    rows_read: int | None = None
    #: What this execution was to cost once its input was read, and of that what it found at the API.
    planned_cost: Cost | None = None
    open_tasks_cost: Cost | None = None
    enrolled: dict[State, int] | None = None
    requests_to_submit: int = 0
    new_requests: int = 0
    #: What was decided about rows rather than requests.
    row_decisions: Counter[Decision] = field(default_factory=Counter)
    reused: int | None = None
    accepted_in_doubt: int = 0
    out_of_time: bool = False
    #: The key may be another workspace's; see `Poller`.
    answers_only: bool = False
    #: What was enrolled last.
    _selection: RequestSelection = field(default_factory=RequestSelection)
    #: Who polls, and shall hurry when a signal came.
    _active_poller: Poller | WorkerPool | None = None
    _background_tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def add_note(self, text: str) -> None:
        """Tell the person, now and in the receipt."""
        self.notes.append(text)
        self.context.on_message(text)

    def interrupt(self, code: ExitCode) -> None:
        """Wind down after a signal: no new POST, answers on the wire are written down, ready results fetched."""
        self.run_state.stop(code, Interrupted(code))
        self.ledger_writer.shorten_waits()
        self._background_tasks.add(asyncio.create_task(self._wind_down(self.context.timeouts.drain_posts_s)))

    def on_ledger_failed(self, error: LedgerFailed) -> None:
        """Wind down when the ledger can't be written: nothing new is sent, what is on the wire is kept elsewhere."""
        self.run_state.stop(error.exit_code, error)
        self._background_tasks.add(asyncio.create_task(self._wind_down(self.context.timeouts.post_s)))

    async def enforce_max_time(self) -> None:
        """Stop submitting early enough to collect, and leave when --max-time is over and the wire is empty."""
        if self.options.max_time_s is None:
            return
        clock, deadline = self.context.clock, self.started_at_s + self.options.max_time_s
        while (remaining_s := deadline - clock.monotonic() - self._collect_reserve_s()) > 0:
            await self.run_state.pause(min(remaining_s, 1.0), self.run_state.abort)
        self.out_of_time = True
        self.run_state.stop_submitting.set()
        self.run_state.notify_change()
        await asyncio.sleep(deadline - clock.monotonic())
        self.ledger_writer.shorten_waits()
        # Cut off now, a slow POST would be in doubt.
        await self.run_state.wait_for_posts(self.context.timeouts.drain_posts_s)
        self.run_state.abort_now()

    def _collect_reserve_s(self) -> float:
        """How long it may take to collect what is in flight, in seconds."""
        share = COLLECT_TIME_SHARE * (self.options.max_time_s or 0.0)
        return min(share, max(10.0, 4 * self.run_state.poll_schedule.median_s))

    async def collect_open_tasks(self) -> None:
        """Ask once for everything that earlier executions left at the API, nearest expiry first."""
        if tasks := await self.ledger_writer.submit(Ledger.take_over_tasks):
            self.add_note(f"{len(tasks)} tasks of an earlier execution are collected first")
            self.open_tasks_cost = await self.ledger_writer.submit(
                self._cost_of_open_tasks, sum(len(task.attempts) for task in tasks)
            )
            poller = self._new_poller()
            poller.poll_once_more = True
            poller.add_earlier_tasks(tasks, polled_before=False)
            await self.run_state.run_until_abort(poller.run())
        share = inf if self.options.max_time_s is None else REPOLL_SHARE * self.options.max_time_s
        written_off = await self.ledger_writer.submit(Ledger.written_off_tasks, self.context.results_kept_since_ms())
        await self._repoll_written_off(written_off, timeout_s=min(REPOLL_S, share), to_be_resubmitted=False)

    async def _repoll_written_off(
        self, tasks: Sequence[Task], *, timeout_s: float = inf, to_be_resubmitted: bool
    ) -> Sequence[Task]:
        """Ask for tasks that were written off: a free question. Return those that could not be asked for."""
        if not tasks or self.run_state.stop_polling.is_set():
            return tasks
        poller = self._new_poller()
        poller.poll_once_more = not to_be_resubmitted
        poller.no_new_tasks = True
        poller.repoll_written_off(tasks, to_be_resubmitted=to_be_resubmitted)
        with _call_after(timeout_s, poller.stop_repolling):
            await self.run_state.run_until_abort(poller.run())
        if poller.revived_requests:
            self.add_note(
                f"{pluralize(poller.revived_requests, 'request')} that had been written off: the API knows the task after all"
            )
        return poller.unpolled_tasks

    async def _repoll_before_resubmitting(self) -> None:
        """Ask for the tasks of what is to be bought again (`--retry`); what can't be asked for now is not bought."""
        tasks = await self.ledger_writer.submit(Ledger.written_off_tasks, 0, only_queued=True)
        queued = await self.ledger_writer.submit(Ledger.queued_count)
        unpolled = await self._repoll_written_off(tasks, to_be_resubmitted=True)
        if unpolled:
            self.add_note(f"{pluralize(len(unpolled), 'task')} could not be asked for: not bought again in this run")
            await self.ledger_writer.submit(
                Ledger.remove_from_queue, [attempt for task in unpolled for attempt in task.attempts]
            )
        if tasks:
            self.requests_to_submit -= queued - await self.ledger_writer.submit(Ledger.queued_count)
            self.enrolled = await self.ledger_writer.submit(Ledger.enrolled_counts)

    async def run_phases(self, job_input: JobInput, target: Location) -> RunSummary:
        """Enroll, dispatch and poll, collect."""
        run_state, ledger_writer = self.run_state, self.ledger_writer
        stamp = job_input.file_versions()
        await self._enroll(job_input, select_requests(self.context.job, self.options, self.context.clock.earliest_ms()))
        await self._repoll_before_resubmitting()
        await self._check_before_spending(job_input)
        if not run_state.stop_submitting.is_set():
            await self._submit_and_poll()
        await ledger_writer.submit(Ledger.recover, self.context.clock.now_ms())
        if self.out_of_time:
            left = await ledger_writer.submit(Ledger.enrolled_counts)
            if left.get(State.SUBMITTED) or await ledger_writer.submit(Ledger.queued_count):
                reason = EnrichError("--max-time is over", "the rest is pending; the next run goes on")
                run_state.exit_reasons.setdefault(ExitCode.TIME, reason)
        if job_input.file_versions() != stamp:
            reason = EnrichError("the input changed while the run was at work", "run again for the rows that are new")
            run_state.exit_reasons.setdefault(ExitCode.API, reason)
            job_input = JobInput(self.context.job, await ledger_writer.submit(Ledger.load_forgotten))
            job_input.check_new_columns(self.preflight.template)
            await self._enroll(
                job_input, select_requests(self.context.job, RunOptions(), self.context.clock.earliest_ms())
            )
        await self.progress.start_phase(Phase.COLLECT)
        return await self._collect(job_input, target)

    async def _enroll(self, job_input: JobInput, selection: RequestSelection) -> None:
        """Mark what this input wants; nothing is spent before it was read to its end without error."""
        template = self.preflight.template
        await self.progress.start_phase(Phase.ENROLL)

        self._selection = selection
        engine = self.context.engine
        if engine is None or job_input.why_not_parallel() is not None:
            enrolled, accepted_in_doubt = await self._enroll_locally(job_input, selection)
        else:
            enrolled, accepted_in_doubt = await self._enroll_on_cluster(engine, job_input, selection)
        self.rows_read, self.row_decisions = enrolled.rows, enrolled.row_decisions
        self.accepted_in_doubt += accepted_in_doubt
        self.row_decisions[Decision.DUPLICATE] = enrolled.requests - sum(
            (await self.ledger_writer.submit(Ledger.decision_counts)).values()
        )
        self.enrolled = await self.ledger_writer.submit(Ledger.enrolled_counts)
        decided = await self.ledger_writer.submit(Ledger.decision_counts)
        self.requests_to_submit = sum(decided.get(decision, 0) for decision in DECISIONS_TO_SEND)
        self.new_requests = decided.get(Decision.NEW, 0)
        if self.planned_cost is None:
            experience = (
                (await self.ledger_writer.submit(Ledger.average_price, template.call))[1]
                if self.requests_to_submit
                else None
            )
            cost = Cost.for_requests(self.requests_to_submit, experience, template.worst_price)
            self.planned_cost = cost if self.open_tasks_cost is None else cost + self.open_tasks_cost
        if self.reused is None:
            self.reused = sum(self.enrolled.get(state, 0) for state in REUSED_STATES)

    async def _enroll_locally(self, job_input: JobInput, selection: RequestSelection) -> tuple[EnrollCounts, int]:
        """Enroll the input in one process, and in one transaction."""
        template = self.preflight.template

        def enroll(ledger: Ledger) -> tuple[EnrollCounts, int]:
            ledger.begin_pass(selection)
            enrolled = EnrollCounts()
            for batch in job_input.batches(template, job_input.queue_order()):
                self.signals.raise_if_received()
                ledger.enroll(template.call, batch.requests())
                enrolled += EnrollCounts.from_batch(batch)
            return enrolled, self._apply_selection(ledger)

        return await self.ledger_writer.submit(enroll)

    async def _enroll_on_cluster(
        self, engine: ClusterEngine, job_input: JobInput, selection: RequestSelection
    ) -> tuple[EnrollCounts, int]:
        """Enroll the input in many processes; what they did before a kill is done again."""
        await self.ledger_writer.submit(Ledger.begin_pass, selection)
        template, callbacks = self.preflight.template, self._cluster_callbacks()
        enrolled = await asyncio.to_thread(engine.enroll, self.context.job, job_input, template, selection, callbacks)
        return enrolled, await self.ledger_writer.submit(self._apply_selection)

    def _apply_selection(self, ledger: Ledger) -> int:
        """Decide about what was seen, now that the whole input was; tell how many doubts were given up."""
        accepted_in_doubt = ledger.accept_in_doubt_as_failed() if self.options.accept_doubts else 0
        ledger.apply_limits()
        ledger.fill_queue()
        return accepted_in_doubt

    def _cluster_callbacks(self) -> ClusterCallbacks:
        """Let who carries a step in another thread know of us."""
        loop = asyncio.get_running_loop()
        return ClusterCallbacks(
            self.signals.raise_if_received,
            lambda text: loop.call_soon_threadsafe(self.add_note, text),
            self.run_state.abort.is_set,
        )

    def _cost_of_open_tasks(self, ledger: Ledger, requests: int) -> Cost:
        """Price what earlier executions left at the API."""
        likely = Cost.for_requests(requests, ledger.average_price(self.preflight.template.call)[1], None).likely
        return Cost(likely, to_credits(ledger.open_reservations()))

    async def _check_before_spending(self, job_input: JobInput) -> None:
        """Refuse when the plan no longer holds, the balance is too low for one request, or the person says no."""
        template, balance = self.preflight.template, self.preflight.balance
        if self.options.plan is not None:
            now = gather_plan_inputs(self.context.job, template, self.preflight.waterfall, job_input)
            check_plan(self.options.plan, now)
        if not self.requests_to_submit:
            return
        check_balance(self.context.job, template, balance)
        if self.options.confirm is not None and not await self.ledger_writer.submit(
            Ledger.has_submitted, self.context.job.name
        ):
            plan = await self.ledger_writer.submit(self._build_plan)
            with self.signals.interruptible():
                agreed = self.options.confirm("\n".join(format_plan(plan)))
            if not agreed:
                raise CommandRefused(
                    "nothing was sent", "set `max_credits`, or use --yes, to run without this question"
                )

    def _build_plan(self, ledger: Ledger) -> Plan:
        decisions = Counter(ledger.decision_counts()) + self.row_decisions
        return build_plan(self.context.job, self.preflight, ledger, self.rows_read or 0, decisions, self.budget.cap)

    async def _submit_and_poll(self) -> None:
        """Send what is wanted; the first of it alone, when a canary judges the answers."""
        canary, progress = self.context.job.model.canary, self.progress
        open_requests = sum(len(task.attempts) for task in await self.ledger_writer.submit(Ledger.submitted_tasks))
        progress.total_requests = progress.done_requests + self.requests_to_submit + open_requests
        if canary is not None and self.new_requests > canary.rows:
            progress.phase = Phase.CANARY
            # What is asked again says nothing: the misses of last month will be misses again.
            await self._submit_and_poll_locally(canary.rows, only_new=True)
            canary_error = check_canary(
                canary, await self.ledger_writer.submit(Ledger.execution_outcome_counts, self.run_state.execution_id)
            )
            if not self.run_state.stop_submitting.is_set() and canary_error is not None:
                self.run_state.stop(ExitCode.CANARY, canary_error)
            if self.run_state.stop_submitting.is_set():
                return
        progress.phase = Phase.ASK
        if not await self._submit_and_poll_with_workers():
            await self._submit_and_poll_locally()

    async def _submit_and_poll_locally(self, limit: int | None = None, *, only_new: bool = False) -> None:
        """Submit and poll until `limit` requests were asked, or all that are wanted, and answered."""
        poller = self._new_poller()
        await self.ledger_writer.submit(Ledger.take_over_tasks)
        poller.add_earlier_tasks(await self.ledger_writer.submit(Ledger.submitted_tasks), polled_before=True)
        await self._work_config().submit_and_poll(poller, limit, only_new=only_new)

    async def _submit_and_poll_with_workers(self) -> bool:
        """Do as `_send` does, by workers; tell whether nothing is left to do here."""
        if (engine := self.context.engine) is None:
            return False
        requests = self.requests_to_submit + len(await self.ledger_writer.submit(Ledger.submitted_tasks))
        pool = engine.make_worker_pool(self.run_state, self._work_config(), self.context.access, requests)
        if pool is None:
            return False
        await self.ledger_writer.submit(Ledger.release_tasks)
        self._active_poller = pool
        await self.run_state.run_until_abort(pool.run())
        if pool.lost_reasons:
            await self._settle_lost_workers(pool.lost_reasons)
        return not pool.lost_reasons

    async def _settle_lost_workers(self, lost_reasons: Sequence[str]) -> None:
        """Note that workers were lost, and wait until what they held is in doubt, or free for any poller."""
        run_state = self.run_state
        counts = Counter(lost_reasons).items()
        lost = ", ".join(f"{count} times: {reason}" if count > 1 else reason for reason, count in counts)
        self.add_note(f"workers were lost ({lost}): what they were at was given to others")
        while (others := await self.ledger_writer.submit(Ledger.other_holders)) and not run_state.stop_polling.is_set():
            remaining_s = max(other.remaining_s for other in others)
            await run_state.pause(min(max(remaining_s, 0.01), LEASE_CHECK_EVERY_S), run_state.stop_polling)
        await self.ledger_writer.submit(Ledger.recover, run_state.clock.now_ms())

    async def _collect(self, job_input: JobInput, target: Location) -> RunSummary:
        """Write the output when the exit code says so, and tell how the rows stand."""
        context = self.context
        settled = self.run_state.counters.settled
        some_failed = bool(settled.get(State.FAILED) or settled.get(State.EXPIRED) or self.accepted_in_doubt)
        code = self.run_state.exit_code({ExitCode.SOME_FAILED: some_failed})
        if code not in OUTPUT_WRITING_CODES:
            if (self.rows_read or 0) > MAX_ROWS_WHEN_INTERRUPTED:
                return await self.finish(code)
            collector = Collector(context.ledger, context.job, self.preflight.template, job_input)
            return await self.finish(code, await self.ledger_writer.submit(lambda _: collector.count_rows()))
        collector = Collector(
            context.ledger, context.job, self.preflight.template, job_input, self.signals.raise_if_received
        )
        counted = await self._write(collector, job_input, target)
        await self._write_extra_outputs(collector)
        # A row of a request in doubt may still show an older answer.
        unconfirmed = counted.statuses[RowStatus.IN_DOUBT] or (
            await self.ledger_writer.submit(Ledger.enrolled_counts)
        ).get(State.IN_DOUBT)
        conditions = {ExitCode.SOME_FAILED: some_failed, ExitCode.IN_DOUBT: bool(unconfirmed)}
        return await self.finish(self.run_state.exit_code(conditions), counted, target)

    async def _write(self, collector: Collector, job_input: JobInput, target: Location) -> OutputCounts:
        """Write the output: a dataset in many processes, where there are any."""
        context = self.context
        if context.engine is None or not is_dataset(target) or not context.job.model.dedupe:
            return await self.ledger_writer.submit(lambda _: collector.write(target))
        template, callbacks = self.preflight.template, self._cluster_callbacks()
        return await asyncio.to_thread(
            context.engine.collect, context.job, job_input, template, self._selection, target, callbacks
        )

    async def _write_extra_outputs(self, collector: Collector) -> None:
        """Write the files beside the output; what the change feed has told is remembered with it."""
        rejects, changes = self.context.job.model.rejects, self.context.job.model.changes
        if rejects is not None:
            target = self.extra_output_paths["rejects"]
            rejected = await self.ledger_writer.submit(lambda _: write_rejects(collector, target, rejects))
            self.extra_output_summary |= {"rejects": str(target), "rejected": rejected}
        if changes is not None:
            target = self.extra_output_paths["changes"]
            changed = await self.ledger_writer.submit(lambda _: write_changes(collector, target, changes))
            self.extra_output_summary |= {"changes": str(target), "changed": changed}

    def _note_cached(self) -> None:
        if cached := self.run_state.counters.cached:
            answers = pluralize(cached, "answer")
            self.add_note(f"{answers} came from the API's cache (a task id that it had given before): paid for once")

    async def finish(
        self, code: ExitCode, counted: OutputCounts | None = None, output: Location | None = None
    ) -> RunSummary:
        """Write the receipt, here and in the ledger."""
        reason, enrolled = self.run_state.exit_reasons.get(code), self.enrolled
        await self._save_latencies()
        self._note_cached()
        receipt = RunSummary(
            job=self.context.job.name,
            exit_code=int(code),
            rows=self.rows_read,
            requests=None if enrolled is None else sum(enrolled.values()),
            reused=self.reused,
            planned=None if self.planned_cost is None else self.planned_cost.as_json(),
            elapsed_s=round(self.context.clock.monotonic() - self.started_at_s, 3),
            output=None if output is None else str(output),
            **self.extra_output_summary,
            notes=self.notes,
            error=None if reason is None else reason.message,
            hint=None if reason is None else reason.hint,
        )
        if counted is not None:
            receipt = receipt.with_row_counts(counted.statuses, counted.filled_by_column)
        finisher = RunFinisher(self.run_state, self.preflight, self.client, self.ledger_writer, self.signals)
        return await finisher.finish_run(receipt)

    def _work_config(self) -> WorkConfig:
        model, preflight = self.context.job.model, self.preflight
        return WorkConfig(
            preflight.template.call,
            self.budget,
            preflight.bound_to,
            model.dispatch.bulk,
            tuple(preflight.template.columns.values()),
            model.policy.max_attempts,
            model.policy.patience.total_seconds(),
        )

    def _new_poller(self) -> Poller:
        poller = self._active_poller = self._work_config().make_poller(self.run_state, self.ledger_writer, self.client)
        poller.answers_only = self.answers_only
        return poller

    async def _wind_down(self, drain_posts_s: float) -> None:
        run_state = self.run_state
        if self._active_poller is not None:
            self._active_poller.finish_early()
        await run_state.wait_for_posts(drain_posts_s)
        await asyncio.sleep(self.context.timeouts.ready_results_s)
        run_state.abort_now()
        self.context.ledger.shorten_waits()

    async def save_latencies_periodically(self) -> None:
        """Write down now and then what was learned, so that a kill does not lose it."""
        with suppress(LedgerFailed):  # whoever writes next tells it
            while True:
                await asyncio.sleep(SAVE_LATENCIES_EVERY_S)
                await self._save_latencies()

    async def _save_latencies(self) -> None:
        """Write down how long tasks take, for the next execution."""
        schedule = self.run_state.poll_schedule
        if schedule.answers_recorded:
            await self.ledger_writer.submit(
                Ledger.save_latencies,
                self.preflight.template.call,
                schedule.weights_by_age,
                self.context.job.model.dispatch.bulk,
            )


@contextmanager
def _call_after(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function once when the block is still at work after that time; inf: never."""
    timer = asyncio.get_running_loop().call_later(seconds, call) if seconds < inf else None
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
