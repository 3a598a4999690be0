"""The steps of one execution: rescue, enroll, dispatch and poll side by side, collect."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any

from enrich.api.client import Client
from enrich.budget import Budget
from enrich.canary import judge
from enrich.closing import Closing
from enrich.collector import Collector, Counted
from enrich.connect import Connection
from enrich.consent import check_balance
from enrich.crew import Crew, make_crew, settle_lost_workers
from enrich.engine import Boss, Engine, Enrolled
from enrich.errors import WRITES_OUTPUT, EnrichError, Exit, Interrupted, LedgerFailed, Refused
from enrich.execution import Execution
from enrich.feeds import write_changes, write_rejects
from enrich.forecast import Cost, Plan, foresee, lines
from enrich.heartbeat import Heartbeat
from enrich.model import ASKED, Decision, RowStatus, State, Task, Wish, many, to_credits
from enrich.place import Place, is_dataset
from enrich.planfile import check, ground
from enrich.poller import Poller
from enrich.pulse import Doing
from enrich.receipt import Receipt
from enrich.rows import Rows
from enrich.shift import Shift
from enrich.signals import Signals
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.surroundings import Options, Surroundings, wish

#: How often it is written down what was learned: a kill loses no more.
LEARNED_S = 30.0
#: Counting the rows for the receipt of an interrupted run must not hold up its exit.
COUNTED_WHEN_INTERRUPTED = 100_000
#: Requests whose answer is reused.
ANSWERED = (State.FOUND, State.NOT_FOUND, State.FAILED)
#: The share of --max-time that is kept at most for collecting what was submitted.
COLLECTING_SHARE = 0.2
#: The longest time in seconds for free questions at the start, and their largest share of --max-time.
ASKING_AGAIN_S, ASKING_AGAIN_SHARE = 60.0, 0.1


@dataclass(slots=True)
class Desk:
    """The steps of one execution that has a connection."""

    around: Surroundings
    options: Options
    signals: Signals
    client: Client
    journal: Journal
    connection: Connection
    execution: Execution
    budget: Budget
    heart: Heartbeat
    started: float = 0.0
    #: Where the files beside the output go.
    feeds: Mapping[str, Place] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: What was written there.
    fed: dict[str, Any] = field(default_factory=dict)
    rows_read: int | None = None
    #: What this execution was to cost once its input was read, and of that what it found at the API.
    planned: Cost | None = None
    carried: Cost | None = None
    enrolled: dict[State, int] | None = None
    to_submit: int = 0
    new: int = 0
    #: What was decided about rows rather than requests.
    of_rows: Counter[Decision] = field(default_factory=Counter)
    reused: int | None = None
    given_up: int = 0
    out_of_time: bool = False
    #: The key may be another workspace's; see `Poller`.
    answers_only: bool = False
    #: What was enrolled last.
    _wish: Wish = field(default_factory=Wish)
    #: Who polls, and shall hurry when a signal came.
    _hurries: Poller | Crew | None = None
    _helpers: set[asyncio.Task[None]] = field(default_factory=set)

    def note(self, text: str) -> None:
        """Tell the person, now and in the receipt."""
        self.notes.append(text)
        self.around.tell(text)

    def interrupt(self, code: Exit) -> None:
        """Wind down after a signal: no new POST, answers on the wire are written down, ready results fetched."""
        self.execution.stop(code, Interrupted(code))
        self.journal.hurry()
        self._helpers.add(asyncio.create_task(self._wind_down(self.around.timing.wire_s)))

    def ledger_failed(self, error: LedgerFailed) -> None:
        """Wind down when the ledger can't be written: nothing new is sent, what is on the wire is kept elsewhere."""
        self.execution.stop(error.exit_code, error)
        self._helpers.add(asyncio.create_task(self._wind_down(self.around.timing.post_s)))

    async def keep_time(self) -> None:
        """Stop submitting early enough to collect, and leave when --max-time is over and the wire is empty."""
        if self.options.max_time_s is None:
            return
        clock, deadline = self.around.clock, self.started + self.options.max_time_s
        while (left := deadline - clock.monotonic() - self._collecting_s()) > 0:
            await self.execution.pause(min(left, 1.0), self.execution.leaving)
        self.out_of_time = True
        self.execution.closing.set()
        self.execution.notify()
        await asyncio.sleep(deadline - clock.monotonic())
        self.journal.hurry()
        # Cut off now, a slow POST would be in doubt.
        await self.execution.wire_empty(self.around.timing.wire_s)
        self.execution.leave()

    def _collecting_s(self) -> float:
        """How long it may take to collect what is in flight, in seconds."""
        share = COLLECTING_SHARE * (self.options.max_time_s or 0.0)
        return min(share, max(10.0, 4 * self.execution.poll_times.typical))

    async def rescue(self) -> None:
        """Ask once for everything that earlier executions left at the API, nearest expiry first."""
        if tasks := await self.journal.do(Ledger.adopt):
            self.note(f"{len(tasks)} tasks of an earlier execution are collected first")
            self.carried = await self.journal.do(self._carry, sum(len(task.attempts) for task in tasks))
            poller = self._new_poller()
            poller.last_round = True
            poller.adopt(tasks, asked_before=False)
            await self.execution.until_leaving(poller.run())
        share = inf if self.options.max_time_s is None else ASKING_AGAIN_SHARE * self.options.max_time_s
        written_off = await self.journal.do(Ledger.written_off, self.around.asked_since())
        await self._ask_again(written_off, at_most_s=min(ASKING_AGAIN_S, share), to_be_bought=False)

    async def _ask_again(self, tasks: Sequence[Task], *, at_most_s: float = inf, to_be_bought: bool) -> Sequence[Task]:
        """Ask for tasks that were written off: a free question. Return those that could not be asked for."""
        if not tasks or self.execution.giving_up.is_set():
            return tasks
        poller = self._new_poller()
        poller.last_round = not to_be_bought
        poller.no_more = True
        poller.ask_again(tasks, to_be_bought=to_be_bought)
        with _after(at_most_s, poller.end_asking_again):
            await self.execution.until_leaving(poller.run())
        if poller.revived:
            self.note(f"{many(poller.revived, 'request')} that had been written off: the API knows the task after all")
        return poller.unasked

    async def _ask_before_buying(self) -> None:
        """Ask for the tasks of what is to be bought again (`--retry`); what can't be asked for now is not bought."""
        tasks = await self.journal.do(Ledger.written_off, 0, queued=True)
        queued = await self.journal.do(Ledger.queued)
        unasked = await self._ask_again(tasks, to_be_bought=True)
        if unasked:
            self.note(f"{many(len(unasked), 'task')} could not be asked for: not bought again in this run")
            await self.journal.do(Ledger.unqueue, [attempt for task in unasked for attempt in task.attempts])
        if tasks:
            self.to_submit -= queued - await self.journal.do(Ledger.queued)
            self.enrolled = await self.journal.do(Ledger.enrolled)

    async def work(self, rows: Rows, target: Place) -> Receipt:
        """Enroll, dispatch and poll, collect."""
        execution, journal = self.execution, self.journal
        stamp = rows.stamp()
        await self._enroll(rows, wish(self.around.job, self.options, self.around.clock.earliest_ms()))
        await self._ask_before_buying()
        await self._check_before_spending(rows)
        if not execution.closing.is_set():
            await self._dispatch_and_poll()
        await journal.do(Ledger.recover, self.around.clock.now_ms())
        if self.out_of_time:
            left = await journal.do(Ledger.enrolled)
            if left.get(State.SUBMITTED) or await journal.do(Ledger.queued):
                reason = EnrichError("--max-time is over", "the rest is pending; the next run goes on")
                execution.reasons.setdefault(Exit.TIME, reason)
        if rows.stamp() != stamp:
            reason = EnrichError("the input changed while the run was at work", "run again for the rows that are new")
            execution.reasons.setdefault(Exit.API, reason)
            rows = Rows(self.around.job, await journal.do(Ledger.forgotten))
            rows.check_new_columns(self.connection.question)
            await self._enroll(rows, wish(self.around.job, Options(), self.around.clock.earliest_ms()))
        await self.heart.begin(Doing.COLLECT)
        return await self._collect(rows, target)

    async def _enroll(self, rows: Rows, wanted: Wish) -> None:
        """Mark what this input wants; nothing is spent before it was read to its end without error."""
        question = self.connection.question
        await self.heart.begin(Doing.ENROLL)

        self._wish = wanted
        engine = self.around.engine
        if engine is None or rows.undivided() is not None:
            read, given_up = await self._read_here(rows, wanted)
        else:
            read, given_up = await self._read_there(engine, rows, wanted)
        self.rows_read, self.of_rows = read.rows, read.of_rows
        self.given_up += given_up
        self.of_rows[Decision.DUPLICATE] = read.asked - sum((await self.journal.do(Ledger.decided)).values())
        self.enrolled = await self.journal.do(Ledger.enrolled)
        decided = await self.journal.do(Ledger.decided)
        self.to_submit = sum(decided.get(decision, 0) for decision in ASKED)
        self.new = decided.get(Decision.NEW, 0)
        if self.planned is None:
            likely = (await self.journal.do(Ledger.experience, question.call))[1] if self.to_submit else None
            cost = Cost.of(self.to_submit, likely, question.worst_price)
            self.planned = cost if self.carried is None else cost + self.carried
        if self.reused is None:
            self.reused = sum(self.enrolled.get(state, 0) for state in ANSWERED)

    async def _read_here(self, rows: Rows, wanted: Wish) -> tuple[Enrolled, int]:
        """Enroll the input in one process, and in one transaction."""
        question = self.connection.question

        def enroll(ledger: Ledger) -> tuple[Enrolled, int]:
            ledger.begin_pass(wanted)
            read = Enrolled()
            for batch in rows.batches(question, rows.order()):
                self.signals.check()
                ledger.enroll(question.call, batch.asked())
                read += Enrolled.of(batch)
            return read, self._decide(ledger)

        return await self.journal.do(enroll)

    async def _read_there(self, engine: Engine, rows: Rows, wanted: Wish) -> tuple[Enrolled, int]:
        """Enroll the input in many processes; what they did before a kill is done again."""
        await self.journal.do(Ledger.begin_pass, wanted)
        question, boss = self.connection.question, self._boss()
        read = await asyncio.to_thread(engine.enroll, self.around.job, rows, question, wanted, boss)
        return read, await self.journal.do(self._decide)

    def _decide(self, ledger: Ledger) -> int:
        """Decide about what was seen, now that the whole input was; tell how many doubts were given up."""
        given_up = ledger.accept_doubts() if self.options.accept_doubts else 0
        ledger.choose()
        ledger.mark()
        return given_up

    def _boss(self) -> Boss:
        """Let who carries a step in another thread know of us."""
        loop = asyncio.get_running_loop()
        return Boss(
            self.signals.check,
            lambda text: loop.call_soon_threadsafe(self.note, text),
            self.execution.leaving.is_set,
        )

    def _carry(self, ledger: Ledger, requests: int) -> Cost:
        """Price what earlier executions left at the API."""
        likely = Cost.of(requests, ledger.experience(self.connection.question.call)[1], None).likely
        return Cost(likely, to_credits(ledger.reserved()))

    async def _check_before_spending(self, rows: Rows) -> None:
        """Refuse when the plan no longer holds, the balance is too low for one request, or the person says no."""
        question, balance = self.connection.question, self.connection.balance
        if self.options.plan is not None:
            now = ground(self.around.job, question, self.connection.waterfall, rows)
            check(self.options.plan, now)
        if not self.to_submit:
            return
        check_balance(self.around.job, question, balance)
        if self.options.confirm is not None and not await self.journal.do(Ledger.was_used, self.around.job.name):
            plan = await self.journal.do(self._foresee)
            with self.signals.asking():
                agreed = self.options.confirm("\n".join(lines(plan)))
            if not agreed:
                raise Refused("nothing was sent", "set `max_credits`, or use --yes, to run without this question")

    def _foresee(self, ledger: Ledger) -> Plan:
        decisions = Counter(ledger.decided()) + self.of_rows
        return foresee(self.around.job, self.connection, ledger, self.rows_read or 0, decisions, self.budget.cap)

    async def _dispatch_and_poll(self) -> None:
        """Send what is wanted; the first of it alone, when a canary judges the answers."""
        canary, heart = self.around.job.model.canary, self.heart
        at_the_api = sum(len(task.attempts) for task in await self.journal.do(Ledger.tasks))
        heart.total = heart.done + self.to_submit + at_the_api
        if canary is not None and self.new > canary.rows:
            heart.doing = Doing.CANARY
            # What is asked again says nothing: the misses of last month will be misses again.
            await self._send(canary.rows, only_new=True)
            stopped = judge(canary, await self.journal.do(Ledger.outcomes, self.execution.id))
            if not self.execution.closing.is_set() and stopped is not None:
                self.execution.stop(Exit.CANARY, stopped)
            if self.execution.closing.is_set():
                return
        heart.doing = Doing.ASK
        if not await self._send_as_crew():
            await self._send()

    async def _send(self, limit: int | None = None, *, only_new: bool = False) -> None:
        """Submit and poll until `limit` requests were asked, or all that are wanted, and answered."""
        poller = self._new_poller()
        await self.journal.do(Ledger.adopt)
        poller.adopt(await self.journal.do(Ledger.tasks), asked_before=True)
        await self._shift().work(poller, limit, only_new=only_new)

    async def _send_as_crew(self) -> bool:
        """Do as `_send` does, by workers; tell whether nothing is left to do here."""
        left = len(await self.journal.do(Ledger.tasks))
        crew = make_crew(self.around, self.execution, self._shift(), self.to_submit + left)
        if crew is None:
            return False
        await self.journal.do(Ledger.release)
        self._hurries = crew
        await self.execution.until_leaving(crew.run())
        if crew.lost:
            await settle_lost_workers(crew, self.journal, self.note)
        return not crew.lost

    async def _collect(self, rows: Rows, target: Place) -> Receipt:
        """Write the output when the exit code says so, and tell how the rows stand."""
        around = self.around
        settled = self.execution.tally.settled
        some_failed = bool(settled.get(State.FAILED) or settled.get(State.EXPIRED) or self.given_up)
        code = self.execution.exit_code({Exit.SOME_FAILED: some_failed})
        if code not in WRITES_OUTPUT:
            if (self.rows_read or 0) > COUNTED_WHEN_INTERRUPTED:
                return await self.finish(code)
            collector = Collector(around.ledger, around.job, self.connection.question, rows)
            return await self.finish(code, await self.journal.do(lambda _: collector.count()))
        collector = Collector(around.ledger, around.job, self.connection.question, rows, self.signals.check)
        counted = await self._write(collector, rows, target)
        await self._write_feeds(collector)
        # A row of a request in doubt may still show an older answer.
        doubtful = counted.statuses[RowStatus.IN_DOUBT] or (await self.journal.do(Ledger.enrolled)).get(State.IN_DOUBT)
        also = {Exit.SOME_FAILED: some_failed, Exit.IN_DOUBT: bool(doubtful)}
        return await self.finish(self.execution.exit_code(also), counted, target)

    async def _write(self, collector: Collector, rows: Rows, target: Place) -> Counted:
        """Write the output: a dataset in many processes, where there are any."""
        around = self.around
        if around.engine is None or not is_dataset(target) or not around.job.model.dedupe:
            return await self.journal.do(lambda _: collector.write(target))
        question, boss = self.connection.question, self._boss()
        return await asyncio.to_thread(around.engine.collect, around.job, rows, question, self._wish, target, boss)

    async def _write_feeds(self, collector: Collector) -> None:
        """Write the files beside the output; what the change feed has told is remembered with it."""
        rejects, changes = self.around.job.model.rejects, self.around.job.model.changes
        if rejects is not None:
            target = self.feeds["rejects"]
            rejected = await self.journal.do(lambda _: write_rejects(collector, target, rejects))
            self.fed |= {"rejects": str(target), "rejected": rejected}
        if changes is not None:
            target = self.feeds["changes"]
            changed = await self.journal.do(lambda _: write_changes(collector, target, changes))
            self.fed |= {"changes": str(target), "changed": changed}

    def _note_cached(self) -> None:
        if cached := self.execution.tally.cached:
            answers = many(cached, "answer")
            self.note(f"{answers} came from the API's cache (a task id that it had given before): paid for once")

    async def finish(self, code: Exit, counted: Counted | None = None, output: Place | None = None) -> Receipt:
        """Write the receipt, here and in the ledger."""
        reason, enrolled = self.execution.reasons.get(code), self.enrolled
        await self._remember()
        self._note_cached()
        receipt = Receipt(
            job=self.around.job.name,
            exit_code=int(code),
            rows=self.rows_read,
            requests=None if enrolled is None else sum(enrolled.values()),
            reused=self.reused,
            planned=None if self.planned is None else self.planned.as_json(),
            elapsed_s=round(self.around.clock.monotonic() - self.started, 3),
            output=None if output is None else str(output),
            **self.fed,
            notes=self.notes,
            error=None if reason is None else reason.message,
            hint=None if reason is None else reason.hint,
        )
        if counted is not None:
            receipt = receipt.with_rows(counted.statuses, counted.hits)
        closing = Closing(self.execution, self.connection, self.client, self.journal, self.signals)
        return await closing.close(receipt)

    def _shift(self) -> Shift:
        model, connection = self.around.job.model, self.connection
        return Shift(
            connection.question.call,
            self.budget,
            connection.bound_to,
            model.dispatch.bulk,
            tuple(connection.question.columns.values()),
            model.policy.max_attempts,
            model.policy.patience.total_seconds(),
        )

    def _new_poller(self) -> Poller:
        poller = self._hurries = self._shift().poller(self.execution, self.journal, self.client)
        poller.answers_only = self.answers_only
        return poller

    async def _wind_down(self, wire_s: float) -> None:
        execution = self.execution
        if self._hurries is not None:
            self._hurries.hurry()
        await execution.wire_empty(wire_s)
        await asyncio.sleep(self.around.timing.ready_s)
        execution.leave()
        self.around.ledger.hurry()

    async def keep_learned(self) -> None:
        """Write down now and then what was learned, so that a kill does not lose it."""
        with suppress(LedgerFailed):  # whoever writes next tells it
            while True:
                await asyncio.sleep(LEARNED_S)
                await self._remember()

    async def _remember(self) -> None:
        """Write down how long tasks take, for the next execution."""
        times = self.execution.poll_times
        if times.heard:
            await self.journal.do(
                Ledger.remember_latencies,
                self.connection.question.call,
                times.learned,
                self.around.job.model.dispatch.bulk,
            )


@contextmanager
def _after(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function once when the block is still at work after that time; inf: never."""
    timer = asyncio.get_running_loop().call_later(seconds, call) if seconds < inf else None
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
