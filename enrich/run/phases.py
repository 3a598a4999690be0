"""The phases of a run: collect open tasks, enroll, submit and poll, collect the output."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from enrich.databar.client import Client
from enrich.errors import CommandRefused, EnrichError
from enrich.exit_codes import OUTPUT_WRITING_CODES, ExitCode
from enrich.job.locations import Location, is_dataset
from enrich.ledger.ledger import Ledger
from enrich.ledger.writer import LedgerWriter
from enrich.models import DECISIONS_TO_SEND, Decision, RequestSelection, RowStatus, State, Task, pluralize, to_credits
from enrich.rows.reader import JobInput
from enrich.run.budget import Budget, check_balance, check_canary
from enrich.run.cluster import ClusterCallbacks, ClusterEngine, EnrollCounts, settle_lost_workers
from enrich.run.collector import Collector, OutputCounts, write_changes, write_rejects
from enrich.run.context import RunContext, RunOptions, select_requests
from enrich.run.early_end import EarlyEnd
from enrich.run.latencies import save_latencies
from enrich.run.loops import WorkConfig
from enrich.run.plan import Cost, Plan, build_plan, format_plan
from enrich.run.plan_file import check_plan, gather_plan_inputs
from enrich.run.poller import Poller
from enrich.run.preflight import Preflight
from enrich.run.progress import Phase, ProgressReporter
from enrich.run.signals import SignalHandler
from enrich.run.state import RunState
from enrich.run.summary import RunFinisher, RunSummary

#: An interrupted run counts the rows for its summary only up to this many, so that it exits quickly.
MAX_ROWS_WHEN_INTERRUPTED = 100_000
#: States of requests whose stored result is reused.
REUSED_STATES = (State.FOUND, State.NOT_FOUND, State.FAILED)
#: Limits for polling written-off tasks at the start, which is free: in seconds, and as a share of --max-time.
REPOLL_S, REPOLL_SHARE = 60.0, 0.1


@dataclass(slots=True)
class RunPhases:
    """The phases of one run, after its preflight."""

    context: RunContext
    options: RunOptions
    signals: SignalHandler
    client: Client
    ledger_writer: LedgerWriter
    preflight: Preflight
    run_state: RunState
    budget: Budget
    progress: ProgressReporter
    early_end: EarlyEnd
    #: Locations of the files beside the output, by kind: `rejects`, `changes`.
    extra_output_paths: Mapping[str, Location] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: Summary fields of the rejects and changes files.
    extra_output_summary: dict[str, Any] = field(default_factory=dict)
    rows_read: int | None = None
    #: Expected cost of this run, set when the input was read; the second is the part for tasks that were already open.
    planned_cost: Cost | None = None
    open_tasks_cost: Cost | None = None
    enrolled: dict[State, int] | None = None
    requests_to_submit: int = 0
    new_requests: int = 0
    #: Decisions about rows rather than requests.
    row_decisions: Counter[Decision] = field(default_factory=Counter)
    reused: int | None = None
    accepted_in_doubt: int = 0
    #: The key may belong to another workspace; see `Poller.answers_only`.
    answers_only: bool = False
    #: The selection that was enrolled last.
    _selection: RequestSelection = field(default_factory=RequestSelection)

    def add_note(self, text: str) -> None:
        """Show a note to the user now, and add it to the run summary."""
        self.notes.append(text)
        self.context.on_message(text)

    async def collect_open_tasks(self) -> None:
        """Poll every task that earlier runs left open once, nearest expiry first; then poll written-off tasks."""
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
        """Poll tasks that were written off, which is free. Returns the tasks that could not be polled."""
        if not tasks or self.run_state.stop_polling.is_set():
            return tasks
        poller = self._new_poller()
        poller.poll_once_more = not to_be_resubmitted
        poller.no_new_tasks = True
        poller.repoll_written_off(tasks, to_be_resubmitted=to_be_resubmitted)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout_s, poller.stop_repolling) if timeout_s < inf else None
        try:
            await self.run_state.run_until_abort(poller.run())
        finally:
            if timer is not None:
                timer.cancel()
        if poller.revived_requests:
            self.add_note(
                f"{pluralize(poller.revived_requests, 'request')} that had been written off: "
                "the API knows the task after all"
            )
        return poller.unpolled_tasks

    async def _repoll_before_resubmitting(self) -> None:
        """Poll the old tasks of requests to be resent (`--retry`). What cannot be polled now is not resent."""
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
        """Enroll, submit and poll, then collect the output."""
        run_state, ledger_writer = self.run_state, self.ledger_writer
        stamp = job_input.file_versions()
        await self._enroll(job_input, select_requests(self.context.job, self.options, self.context.clock.earliest_ms()))
        await self._repoll_before_resubmitting()
        await self._check_before_spending(job_input)
        if not run_state.stop_submitting.is_set():
            await self._submit_and_poll()
        await ledger_writer.submit(Ledger.recover, self.context.clock.now_ms())
        if self.early_end.out_of_time:
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
        """Mark the requests of this input. Nothing is spent before the whole input was read without error."""
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
        """Enroll the input in this process, in one transaction."""
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
        """Enroll the input in many processes. Work done before a kill is repeated."""
        await self.ledger_writer.submit(Ledger.begin_pass, selection)
        template, callbacks = self.preflight.template, self._cluster_callbacks()
        enrolled = await asyncio.to_thread(engine.enroll, self.context.job, job_input, template, selection, callbacks)
        return enrolled, await self.ledger_writer.submit(self._apply_selection)

    def _apply_selection(self, ledger: Ledger) -> int:
        """Decide what to send, once the whole input was read. Returns how many unconfirmed requests became failed."""
        accepted_in_doubt = ledger.accept_in_doubt_as_failed() if self.options.accept_doubts else 0
        ledger.apply_limits()
        ledger.fill_queue()
        return accepted_in_doubt

    def _cluster_callbacks(self) -> ClusterCallbacks:
        """Return the callbacks for a phase that runs in another thread."""
        loop = asyncio.get_running_loop()
        return ClusterCallbacks(
            self.signals.raise_if_received,
            lambda text: loop.call_soon_threadsafe(self.add_note, text),
            self.run_state.abort.is_set,
        )

    def _cost_of_open_tasks(self, ledger: Ledger, requests: int) -> Cost:
        """Return the expected cost of the tasks that earlier runs left open."""
        likely = Cost.for_requests(requests, ledger.average_price(self.preflight.template.call)[1], None).likely
        return Cost(likely, to_credits(ledger.open_reservations()))

    async def _check_before_spending(self, job_input: JobInput) -> None:
        """Refuse when the plan no longer holds, the balance is too low for one request, or the user declines."""
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
        """Submit the selected requests. With a canary, submit its rows first and check their results."""
        canary, progress = self.context.job.model.canary, self.progress
        open_requests = sum(len(task.attempts) for task in await self.ledger_writer.submit(Ledger.submitted_tasks))
        progress.total_requests = progress.done_requests + self.requests_to_submit + open_requests
        if canary is not None and self.new_requests > canary.rows:
            progress.phase = Phase.CANARY
            # Resent requests prove nothing: requests without a match last month will have none again.
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
        """Submit and poll until `limit` requests (None: all selected ones) were sent and settled."""
        poller = self._new_poller()
        await self.ledger_writer.submit(Ledger.take_over_tasks)
        poller.add_earlier_tasks(await self.ledger_writer.submit(Ledger.submitted_tasks), polled_before=True)
        await self._work_config().submit_and_poll(poller, limit, only_new=only_new)

    async def _submit_and_poll_with_workers(self) -> bool:
        """Submit and poll with workers. Returns whether nothing is left to do in this process."""
        if (engine := self.context.engine) is None:
            return False
        requests = self.requests_to_submit + len(await self.ledger_writer.submit(Ledger.submitted_tasks))
        pool = engine.make_worker_pool(self.run_state, self._work_config(), self.context.access, requests)
        if pool is None:
            return False
        await self.ledger_writer.submit(Ledger.release_tasks)
        self.early_end.active_poller = pool
        await self.run_state.run_until_abort(pool.run())
        if pool.lost_reasons:
            await settle_lost_workers(pool.lost_reasons, self.run_state, self.ledger_writer, self.add_note)
        return not pool.lost_reasons

    async def _collect(self, job_input: JobInput, target: Location) -> RunSummary:
        """Write the output if the exit code allows it, and count the rows by status."""
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
        # A row whose request is unconfirmed may still show an older result.
        unconfirmed = counted.statuses[RowStatus.IN_DOUBT] or (
            await self.ledger_writer.submit(Ledger.enrolled_counts)
        ).get(State.IN_DOUBT)
        conditions = {ExitCode.SOME_FAILED: some_failed, ExitCode.IN_DOUBT: bool(unconfirmed)}
        return await self.finish(self.run_state.exit_code(conditions), counted, target)

    async def _write(self, collector: Collector, job_input: JobInput, target: Location) -> OutputCounts:
        """Write the output. With a cluster engine, many processes write a dataset."""
        context = self.context
        if context.engine is None or not is_dataset(target) or not context.job.model.dedupe:
            return await self.ledger_writer.submit(lambda _: collector.write(target))
        template, callbacks = self.preflight.template, self._cluster_callbacks()
        return await asyncio.to_thread(
            context.engine.collect, context.job, job_input, template, self._selection, target, callbacks
        )

    async def _write_extra_outputs(self, collector: Collector) -> None:
        """Write the rejects and changes files. The ledger records which changes were written."""
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
        """Complete the run summary and store it in the ledger."""
        reason, enrolled = self.run_state.exit_reasons.get(code), self.enrolled
        await save_latencies(self.run_state, self.ledger_writer, self.preflight.template, self.context.job)
        self._note_cached()
        receipt = RunSummary(
            job=self.context.job.name,
            exit_code=int(code),
            rows=self.rows_read,
            requests=None if enrolled is None else sum(enrolled.values()),
            reused=self.reused,
            planned=None if self.planned_cost is None else self.planned_cost.as_json(),
            elapsed_s=round(self.context.clock.monotonic() - self.early_end.started_at_s, 3),
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
        poller = self.early_end.active_poller = self._work_config().make_poller(
            self.run_state, self.ledger_writer, self.client
        )
        poller.answers_only = self.answers_only
        return poller
