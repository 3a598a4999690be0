"""The poller: every answer is collected in time, none is invented, and waiting always ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest
from msgspec.structs import replace

from enrich.databar.clock import SystemClock
from enrich.databar.task_results import TaskReply
from enrich.errors import EnrichError, InvalidPollResponse, RateLimited, RequestNotAccepted
from enrich.exit_codes import ExitCode
from enrich.ledger import queries, resume, transitions
from enrich.models import MICROS_PER_CREDIT, State
from enrich.run.poll_schedule import PollCost, PollSchedule
from enrich.run.run_state import RunState, Timeouts
from enrich.sandbox.settings import Fault
from tests.support.cases import in_turn
from tests.support.run_loops import LoopHarness, open_loops, wait_until
from tests.support.workspace import SHORT_OUTAGE_TIMEOUT, SHORT_TIMEOUTS, SandboxApi, serve_api

LEDGER = "ledger.db"


def run_scenario(
    path: Path, api: SandboxApi, scenario: Callable[[LoopHarness], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    """Run a scenario on one execution."""

    async def run_loops() -> None:
        async with open_loops(api, path / LEDGER, **settings) as harness:
            await scenario(harness)

    asyncio.run(run_loops())


def assert_counts(harness: LoopHarness, **counts: int) -> bool:
    """Check the ledger's counts; return True."""
    return queries.state_counts(harness.ledger.wrapped) == {State(name): count for name, count in counts.items()}


async def submit_as_earlier_run(harness: LoopHarness, count: int) -> None:
    """Submit requests as an earlier execution, whose tasks are then unknown to this one."""
    await harness.submit_all(harness.make_poller())
    harness.run_state.open_tasks = 0
    assert assert_counts(harness, submitted=count)


class TestAnswers:
    """The effect of a task's answer on its request."""

    @pytest.mark.long
    def test_answers_settle_at_their_price(self, tmp_path: Path) -> None:
        """Found, missed and failed tasks settle at the price that the API charged."""

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops()
            assert harness.run_state.open_tasks == 0
            counts = queries.state_counts(harness.ledger.wrapped)
            assert counts == harness.run_state.counters.settled
            assert sum(counts.values()) == 60
            spent, reserved, unknown, _ = harness.ledger.execution_counters
            assert (spent, reserved, unknown) == (harness.run_state.counters.spent, 0, 0)
            assert spent / MICROS_PER_CREDIT == pytest.approx(harness.api.audit()["credits_charged"])

        with serve_api(tmp_path / "api.db", latency="uniform(0,0.2)", failure_rate=0.3) as api:
            run_scenario(tmp_path, api, scenario, leads=range(60))
            assert api.audit()["paid_twice"] == 0

    @pytest.mark.long
    @pytest.mark.parametrize(("lasting", "polls"), [(None, 6), (0.1, 3)])
    def test_no_data_becomes_no_match(self, tmp_path: Path, lasting: float | None, polls: int) -> None:
        """A task without data is polled for a while, then becomes a miss at its price."""

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops()
            assert assert_counts(harness, not_found=3)
            assert harness.ledger.execution_counters[:3] == (0, 0, 0)
            assert len(harness.request_log.polled_task_ids) >= polls
            if lasting is None:  # otherwise a busy machine may poll after it is over
                assert harness.ledger.query_one("SELECT sum(acknowledged) FROM attempts") == (3,)

        with serve_api(tmp_path / "api.db", hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=lasting) as api:
            run_scenario(tmp_path, api, scenario, leads=range(3))

    @in_turn(
        "statuses",
        [("no_data", "processing", "completed"), ("no_data", "completed"), ("completed", "processing", "no_data")],
    )
    def test_grace_begins_with_each_status(self, api: SandboxApi, tmp_path: Path, statuses: tuple[str, ...]) -> None:
        """The time until no data counts as no match begins again when the task has had another status meanwhile."""
        tasks: list[dict[str, Any]] = [
            {"status": status, "data": None, "credits_spent": int(status == "completed")} for status in statuses
        ]
        tasks.append({"status": "completed", "data": {"email": "ada@engine.example"}, "credits_spent": 1})
        replies = iter([TaskReply(task, json.dumps(task)) for task in tasks])

        async def scenario(harness: LoopHarness) -> None:
            with patch.object(harness.client, "poll_task", AsyncMock(side_effect=replies)):
                await harness.run_loops()
            assert assert_counts(harness, found=1)

        with patch("enrich.run.poller.NO_DATA_POLL_S", SHORT_TIMEOUTS.no_data_s):
            run_scenario(tmp_path, api, scenario, leads=range(1))

    def test_grace_for_unfinished_bulk_task(self, api: SandboxApi, tmp_path: Path) -> None:
        """A completed bulk task that still counts running rows, and has no data for them, is polled for a while."""
        running = {"total": 2, "completed": 1, "no_data": 0, "failed": 0, "processing": 1}
        ada = {"email": "ada@engine.example"}
        tasks: list[dict[str, Any]] = [
            {"status": "completed", "progress": running, "data": data, "credits_spent": 0}
            for data in ([None, None], [ada, None], [ada, ada])
        ]
        replies = iter([TaskReply(task, json.dumps(task)) for task in tasks])

        async def scenario(harness: LoopHarness) -> None:
            with patch.object(harness.client, "poll_task", AsyncMock(side_effect=replies)):
                await harness.run_loops(bulk=2)
            assert assert_counts(harness, found=2)

        with patch("enrich.run.poller.NO_DATA_POLL_S", SHORT_TIMEOUTS.no_data_s / 10):
            run_scenario(tmp_path, api, scenario, leads=range(2))

    def test_unknown_status_means_running(self, api: SandboxApi, tmp_path: Path) -> None:
        """An unknown status is no end: the task is polled until it has a known one."""
        api.inject_fault("odd-status", 3, "post", polls=3)

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops()
            assert set(queries.state_counts(harness.ledger.wrapped)) <= {State.FOUND, State.NOT_FOUND}
            assert len(harness.request_log.polled_task_ids) == 12

        run_scenario(tmp_path, api, scenario, leads=range(3))

    @pytest.mark.parametrize("expired_as", ["410", "gone"])
    def test_late_result_is_expired(self, tmp_path: Path, expired_as: str) -> None:
        """410 and the status `gone` both mean expired; the price is unknown and stays reserved."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 2)
            reserved = harness.ledger.execution_counters[1]
            harness.api.advance(3 * 86_400)
            await harness.poll_open_tasks(harness.make_poller())
            assert assert_counts(harness, expired=2)
            assert harness.ledger.execution_counters == (0, reserved, 2, 2)
            assert harness.run_state.counters.settled == {State.EXPIRED: 2}

        with serve_api(tmp_path / "api.db", expired_as=expired_as) as api:
            run_scenario(tmp_path, api, scenario, leads=range(2))

    def test_unacknowledged_lost_task_is_in_doubt(self, api: SandboxApi, tmp_path: Path) -> None:
        """A 404 counts only when the task is no longer young; it is then unknown whether it was charged."""
        api.inject_fault("lost-task", 1, "post")

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops()
            counts = queries.state_counts(harness.ledger.wrapped)
            assert (counts[State.IN_DOUBT], sum(counts.values())) == (1, 3)
            assert harness.ledger.execution_counters[1] > 0
            (age,) = harness.ledger.query_one("SELECT settled_ms - submitted_ms FROM attempts WHERE state = 'in_doubt'")
            assert age >= SHORT_TIMEOUTS.young_task_s * 1000
            assert harness.run_state.open_tasks == 0

        run_scenario(tmp_path, api, scenario, leads=range(3))

    def test_acknowledged_lost_task_is_expired(self, api: SandboxApi, tmp_path: Path) -> None:
        """A lost task that the API once acknowledged is expired: it was accepted, and its result is gone."""

        async def scenario(harness: LoopHarness) -> None:
            harness.add_open_tasks(("forgotten", 90.0), acknowledged=True)
            await harness.poll_open_tasks(harness.make_poller())
            assert assert_counts(harness, expired=1)

        run_scenario(tmp_path, api, scenario, leads=range(1))

    def test_young_unknown_task_is_awaited(self, api: SandboxApi, tmp_path: Path) -> None:
        """A young task may not be known yet, so a 404 is repeated."""
        api.inject_fault("late-task", 2, "post", seconds=0.3)

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops()
            assert set(queries.state_counts(harness.ledger.wrapped)) <= {State.FOUND, State.NOT_FOUND}

        run_scenario(tmp_path, api, scenario, leads=range(2))

    def test_acknowledged_flag_is_stored(self, tmp_path: Path) -> None:
        """The ledger stores that the API acknowledged a task, for the next execution."""

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops(harness.make_poller(patience_s=0.1))
            assert [task.acknowledged for task in transitions.submitted_tasks(harness.ledger.wrapped)] == [True, True]

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scenario, leads=range(2))

    @pytest.mark.long
    @pytest.mark.parametrize("fault", ["error-before", "rate-limit-bare", "reset-before"])
    def test_failed_poll_is_repeated(self, api: SandboxApi, tmp_path: Path, fault: str) -> None:
        """A failed poll costs nothing and is repeated until the answer arrives."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 3)
            harness.api.inject_fault(fault, 3, "get")
            await harness.poll_open_tasks(harness.make_poller())
            assert set(queries.state_counts(harness.ledger.wrapped)) <= {State.FOUND, State.NOT_FOUND}
            assert harness.run_state.exit_reasons == {}

        run_scenario(tmp_path, api, scenario, leads=range(3), timing=SHORT_TIMEOUTS)

    def test_free_failures_end_as_failed(self, tmp_path: Path) -> None:
        """Edge g: after `max_attempts` free failures, the request has failed."""

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops(harness.make_poller(max_attempts=1))
            assert assert_counts(harness, failed=4)
            assert harness.request_log.posts == 4
            assert harness.ledger.execution_counters[:3] == (0, 0, 0)

        with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
            run_scenario(tmp_path, api, scenario, leads=range(4))


class TestOrder:
    """The order of polls."""

    def test_nearest_expiry_polled_first(self, api: SandboxApi, tmp_path: Path) -> None:
        """Of the tasks that are due, the oldest is polled first, whatever the order they were added in."""

        async def scenario(harness: LoopHarness) -> None:
            ages = [30.0, 10.0, 50.0, 20.0, 40.0]
            harness.add_open_tasks(*((f"task-{age:.0f}", age) for age in ages))
            poller = harness.make_poller()
            poller.add_earlier_tasks(transitions.submitted_tasks(harness.ledger.wrapped)[::-1], polled_before=False)
            poller.poll_once_more = True
            await harness.run_state.run_until_abort(poller.run())
            # A 404 is repeated on a new connection.
            assert list(dict.fromkeys(harness.request_log.polled_task_ids)) == [
                "task-50",
                "task-40",
                "task-30",
                "task-20",
                "task-10",
            ]

        run_scenario(
            tmp_path, api, scenario, leads=range(5), rate=50.0, timing=replace(SHORT_TIMEOUTS, young_task_s=60)
        )

    def test_last_round_polls_each_once(self, tmp_path: Path) -> None:
        """The last round polls each task once; tasks that still run stay open and are no failure of this execution."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 40)
            await harness.poll_once(harness.make_poller())
            assert sorted(harness.request_log.polled_task_ids) == sorted(set(harness.request_log.polled_task_ids))
            assert len(harness.request_log.polled_task_ids) == 40
            assert assert_counts(harness, submitted=40)
            assert (harness.run_state.open_tasks, harness.run_state.exit_reasons) == (0, {})

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scenario, leads=range(40))

    @pytest.mark.long
    def test_last_round_repeats_after_429(self, api: SandboxApi, tmp_path: Path) -> None:
        """In the last round a 429 is repeated, so each earlier task is really polled before anything new is bought."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 20)
            harness.api.inject_fault("rate-limit-bare", 15, "get")
            await harness.poll_once(harness.make_poller())
            assert set(queries.state_counts(harness.ledger.wrapped)) <= {State.FOUND, State.NOT_FOUND}

        run_scenario(tmp_path, api, scenario, leads=range(20), timing=SHORT_TIMEOUTS)

    @pytest.mark.long
    def test_last_round_keeps_no_data_open(self, tmp_path: Path) -> None:
        """In the last round a task without data stays open, and the next loop polls it again."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 2)
            await harness.poll_once(harness.make_poller())
            assert assert_counts(harness, submitted=2)
            await harness.poll_open_tasks(harness.make_poller(), polled_before=True)
            assert assert_counts(harness, not_found=2)

        with serve_api(tmp_path / "api.db", hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=None) as api:
            run_scenario(tmp_path, api, scenario, leads=range(2))

    def test_finish_early_polls_all_once(self, tmp_path: Path) -> None:
        """After a signal each task is polled once more, even if it is not due, and then the loop ends."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 5)
            poller = harness.make_poller()
            poller.add_earlier_tasks(transitions.submitted_tasks(harness.ledger.wrapped), polled_before=True)
            harness.run_state.poll_schedule.MIN_DELAY_S = harness.run_state.poll_schedule.MAX_DELAY_S = 60.0
            running = asyncio.create_task(poller.run())
            await wait_until(lambda: len(harness.request_log.polled_task_ids) == 5 and not poller._open_polls)
            poller.finish_early()
            await asyncio.wait_for(running, 10)  # not the 60 s after which they are due
            assert sorted(harness.request_log.polled_task_ids[:5]) == sorted(harness.request_log.polled_task_ids[5:])
            assert (harness.run_state.open_tasks, harness.run_state.exit_reasons) == (0, {})

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scenario, leads=range(5))


class TestTimeouts:
    """When waiting ends."""

    def test_task_timeout_ends_waiting(self, tmp_path: Path) -> None:
        """After the task timeout the run goes on without the task and ends with exit 13; the ledger keeps the task."""

        async def scenario(harness: LoopHarness) -> None:
            await harness.run_loops(harness.make_poller(patience_s=0.3))
            assert set(harness.run_state.exit_reasons) == {ExitCode.TIME}
            assert assert_counts(harness, submitted=3)
            assert harness.run_state.open_tasks == 0

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scenario, leads=range(3))

    def test_old_task_is_polled_once(self, tmp_path: Path) -> None:
        """A task that an earlier execution stopped waiting for is polled once more."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 1)
            await harness.poll_once(harness.make_poller(patience_s=0.0))
            await asyncio.sleep(0.01)
            await harness.poll_open_tasks(harness.make_poller(patience_s=0.0), polled_before=True)
            assert len(harness.request_log.polled_task_ids) == 2
            assert set(harness.run_state.exit_reasons) == {ExitCode.TIME}
            assert harness.run_state.open_tasks == 0

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scenario, leads=range(1))

    @pytest.mark.parametrize(
        "reply",
        [
            {"status": "no_data", "data": None, "credits_spent": 1},
            {"status": "completed", "data": None, "credits_spent": 1},
            RequestNotAccepted("the API answered 503"),
            RateLimited("the API answered 429", None),
            InvalidPollResponse("the response is no JSON"),
            InvalidPollResponse("the response is no JSON", new_connection=False),
        ],
        ids=["no_data", "completed without data", "503", "429", "unreadable", "unreadable, old connection"],
    )
    def test_old_task_settles(self, api: SandboxApi, tmp_path: Path, reply: dict[str, Any] | Exception) -> None:
        """A task older than the task timeout settles in this run: failed polls and those without data are repeated."""
        found = {"status": "completed", "data": {"email": "ada@engine.example"}, "credits_spent": 1}
        first = reply if isinstance(reply, Exception) else TaskReply(reply, json.dumps(reply))
        replies = chain([first], repeat(TaskReply(found, json.dumps(found))))

        async def scenario(harness: LoopHarness) -> None:
            harness.add_open_tasks(("old", 90.0), acknowledged=True)
            with patch.object(harness.client, "poll_task", AsyncMock(side_effect=replies)):
                await harness.poll_open_tasks(harness.make_poller(), polled_before=True)
            assert harness.run_state.exit_reasons == {}
            assert assert_counts(harness, found=1)

        short = patch.multiple("enrich.run.poller", NO_DATA_POLL_S=0.05, FAILED_POLL_S=0.05)
        with short, patch("enrich.run.poll_schedule.PollSchedule.MIN_DELAY_S", 0.05):
            run_scenario(tmp_path, api, scenario, leads=range(1))

    def test_old_task_whose_polls_fail(self, api: SandboxApi, tmp_path: Path) -> None:
        """Such a task is left to the next run when only its polls fail, for as long as an outage."""
        running = {"status": "processing"}

        async def scenario(harness: LoopHarness) -> None:
            async def poll_task(task_id: str, **_: object) -> TaskReply:
                if task_id == "failing":
                    harness.run_state.record_success()  # of the other task, which a busy machine may poll late
                    raise RequestNotAccepted("the API answered 503")
                return TaskReply(running, json.dumps(running))

            harness.add_open_tasks(("failing", 90.0), ("running", 57.0), acknowledged=True)
            with patch.object(harness.client, "poll_task", poll_task):
                await harness.poll_open_tasks(harness.make_poller())
            assert set(harness.run_state.exit_reasons) == {ExitCode.TIME}
            assert assert_counts(harness, submitted=2)

        with patch("enrich.run.poller.FAILED_POLL_S", 0.05):
            run_scenario(tmp_path, api, scenario, leads=range(2), timing=SHORT_OUTAGE_TIMEOUT)

    @pytest.mark.long
    @pytest.mark.parametrize("fault", ["error-before", "rate-limit-bare"])
    def test_outage_ends_polling(self, api: SandboxApi, tmp_path: Path, fault: str) -> None:
        """Without one good response during the outage limit, polling ends with exit 4, and the tasks stay open."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 3)
            harness.api.inject_fault(fault, 10_000, "get")
            await harness.poll_open_tasks(harness.make_poller())
            assert set(harness.run_state.exit_reasons) == {ExitCode.API}
            assert assert_counts(harness, submitted=3)

        run_scenario(tmp_path, api, scenario, leads=range(3), timing=SHORT_OUTAGE_TIMEOUT)

    @pytest.mark.long
    @pytest.mark.parametrize("fault", ["unauthorized", "forbidden"])
    def test_wrong_key_waits_for_posts_in_flight(self, tmp_path: Path, fault: str) -> None:
        """After a refused key, POSTs in flight are recorded first; an abort would leave them in doubt."""

        async def scenario(harness: LoopHarness) -> None:
            work = asyncio.create_task(harness.run_loops())
            await wait_until(lambda: harness.run_state.open_tasks > 0 and harness.request_log.posts_in_flight > 0)
            harness.api.inject_fault(fault, 10_000, "get")
            await work
            assert set(harness.run_state.exit_reasons) == {ExitCode.KEY}
            assert await harness.writer.submit(resume.recover, 1) == 0
            counts = queries.state_counts(harness.ledger.wrapped)
            assert State.IN_DOUBT not in counts
            assert counts[State.SUBMITTED] > 0
            assert counts[State.PENDING] > 0

        slow = (Fault("slow", 1.0, "post", {"seconds": 0.3}),)
        with serve_api(tmp_path / "api.db", faults=slow, latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scenario, leads=range(200))

    def test_clock_set_back(self, api: SandboxApi, tmp_path: Path) -> None:
        """With the clock set back, a task from the future counts as new and is polled soon."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 2)
            clock = harness.run_state.clock
            assert isinstance(clock, ShiftedClock)
            clock.offset_ms = -200_000
            started = time.monotonic()
            await harness.poll_open_tasks(harness.make_poller(), polled_before=True)
            assert time.monotonic() - started < 60
            assert set(queries.state_counts(harness.ledger.wrapped)) <= {State.FOUND, State.NOT_FOUND}

        run_scenario(tmp_path, api, scenario, leads=range(2), clock=ShiftedClock())

    def test_abort_cancels_polls(self, tmp_path: Path) -> None:
        """An abort cancels polls without a response; their tasks stay open."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 3)
            work = asyncio.create_task(harness.poll_open_tasks(harness.make_poller()))
            await wait_until(lambda: len(harness.request_log.polled_task_ids) == 3)
            started = time.monotonic()
            harness.run_state.abort_now()
            await work
            assert time.monotonic() - started < 3
            assert assert_counts(harness, submitted=3)

        slow = (Fault("slow", 1.0, "get", {"seconds": 5}),)
        with serve_api(tmp_path / "api.db", faults=slow) as api:
            run_scenario(tmp_path, api, scenario, leads=range(3), timing=Timeouts())

    @pytest.mark.long
    def test_waiting_uses_no_cpu(self, tmp_path: Path) -> None:
        """The loop sleeps between polls, and polls become rare."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 50)
            harness.run_state.poll_schedule = PollSchedule()
            with patch.object(
                RunState, "wait_for_change", autospec=True, side_effect=RunState.wait_for_change
            ) as waits:
                await harness.poll_open_tasks(harness.make_poller())
            polls = len(harness.request_log.polled_task_ids)
            assert polls <= 50 * 5
            # Each poll starts and ends, and the loop wakes once a second; it does nothing else.
            assert waits.call_count <= 2 * polls + 60
            assert State.SUBMITTED not in queries.state_counts(harness.ledger.wrapped)

        with serve_api(tmp_path / "api.db", latency="fixed(2)") as api:
            run_scenario(tmp_path, api, scenario, leads=range(50))

    def test_deferred_polls_run_after_submits(self, tmp_path: Path) -> None:
        """Polls that were deferred to leave slots for submits are brought forward when no submits are left."""

        async def scenario(harness: LoopHarness) -> None:
            for latency in (0.5, 1.0, 1.5, 2.0, 3.0) * 10:
                harness.run_state.poll_schedule.record_duration(0.9 * latency, latency)
            assert harness.run_state.poll_cost is PollCost.HIGH
            await harness.submit_all(poller := harness.make_poller())
            tasks, poller._scheduled = [task for _, _, task in poller._scheduled], []
            for task in tasks:  # all at this time, however long the submitting took
                poller._schedule(task, poller._poll_delay_s(poller._age_s(task)))
            meant = min(due for due, _, _ in poller._scheduled)
            poller.no_new_tasks = True
            poller._bring_polls_forward()
            assert max(due for due, _, _ in poller._scheduled) < meant

        with serve_api(tmp_path / "api.db") as api:
            run_scenario(tmp_path, api, scenario, leads=range(3), rate=20.0)

    @pytest.mark.long
    def test_ledger_error_stops_poller(self, api: SandboxApi, tmp_path: Path) -> None:
        """An answer that can't be stored is not counted, and the ledger's error is raised unchanged."""

        async def scenario(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 40)
            harness.ledger.wrapped.session.execute("PRAGMA query_only = 1")
            with pytest.raises(EnrichError, match="cannot be written"):
                await harness.poll_open_tasks(harness.make_poller())
            assert harness.run_state.counters.settled == {}
            harness.ledger.wrapped.session.execute("PRAGMA query_only = 0")
            assert assert_counts(harness, submitted=40)

        run_scenario(tmp_path, api, scenario, leads=range(40))


@dataclass(slots=True)
class ShiftedClock(SystemClock):
    """A clock that can be set."""

    offset_ms: int = 0

    def now_ms(self) -> int:
        """Return the time with the offset."""
        return time.time_ns() // 1_000_000 + self.offset_ms
