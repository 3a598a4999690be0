"""The poller: every answer is brought in time, none is made up, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from enrich.errors import EnrichError, Exit
from enrich.execution import Execution, Timing
from enrich.model import MICROS, State, SystemClock
from enrich.polls import PollTimes, Price
from enrich.sandbox.faults import Fault
from enrich.store.ledger import Ledger
from tests.harness import ILL, SHORT_TIMEOUTS, SandboxApi, serve_api
from tests.loops import LoopHarness, open_loops, wait_until

LEDGER = "ledger.db"


def run_scenario(
    path: Path, api: SandboxApi, scenario: Callable[[LoopHarness], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    """Play a scene on one execution."""

    async def played() -> None:
        async with open_loops(api, path / LEDGER, **settings) as harness:
            await scenario(harness)

    asyncio.run(played())


def assert_counts(harness: LoopHarness, **counts: int) -> bool:
    """Compare the ledger's counts."""
    return harness.books.ledger.counts() == {State(name): count for name, count in counts.items()}


async def submit_as_earlier_run(harness: LoopHarness, count: int) -> None:
    """Submit requests as an earlier execution did, and forget them."""
    await harness.dispatcher(harness.poller(), limit=count).run()
    harness.execution.in_flight = 0
    assert assert_counts(harness, submitted=count)


class TestAnswers:
    """What a task says, and what becomes of its request."""

    def test_answers_settle_at_their_price(self, tmp_path: Path) -> None:
        """Found, missed and failed: the ledger's credits are those that the API charged."""

        async def scene(harness: LoopHarness) -> None:
            await harness.work()
            assert harness.execution.in_flight == 0
            counts = harness.books.ledger.counts()
            assert counts == harness.execution.tally.settled
            assert sum(counts.values()) == 60
            spent, reserved, unknown, _ = harness.books.money
            assert (spent, reserved, unknown) == (harness.execution.tally.spent, 0, 0)
            assert spent / MICROS == pytest.approx(harness.api.audit()["credits_charged"])

        with serve_api(tmp_path / "api.db", latency="uniform(0,0.2)", failure_rate=0.3) as api:
            run_scenario(tmp_path, api, scene, leads=range(60))
            assert api.audit()["paid_twice"] == 0

    @pytest.mark.parametrize(("lasting", "polls"), [(None, 6), (0.1, 3)])
    def test_no_data_becomes_no_match(self, tmp_path: Path, lasting: float | None, polls: int) -> None:
        """It is asked again for a while; then it is a miss that is settled at its price."""

        async def scene(harness: LoopHarness) -> None:
            await harness.work()
            assert assert_counts(harness, not_found=3)
            assert harness.books.money[:3] == (0, 0, 0)
            assert len(harness.watch.asked) >= polls
            assert harness.books.one("SELECT sum(seen_alive) FROM attempts") == (3,)

        with serve_api(tmp_path / "api.db", hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=lasting) as api:
            run_scenario(tmp_path, api, scene, leads=range(3))

    def test_unknown_status_means_running(self, api: SandboxApi, tmp_path: Path) -> None:
        """An odd word is no end: the task is asked until it has one."""
        api.fault("odd-status", 3, "post", polls=3)

        async def scene(harness: LoopHarness) -> None:
            await harness.work()
            assert set(harness.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}
            assert len(harness.watch.asked) == 12

        run_scenario(tmp_path, api, scene, leads=range(3))

    @pytest.mark.parametrize("expired_as", ["410", "gone"])
    def test_late_result_is_expired(self, tmp_path: Path, expired_as: str) -> None:
        """410 and the status `gone` say the same; the price is not known and stays reserved."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 2)
            reserved = harness.books.money[1]
            harness.api.advance(3 * 86_400)
            await harness.adopt(harness.poller())
            assert assert_counts(harness, expired=2)
            assert harness.books.money == (0, reserved, 2, 2)
            assert harness.execution.tally.settled == {State.EXPIRED: 2}

        with serve_api(tmp_path / "api.db", expired_as=expired_as) as api:
            run_scenario(tmp_path, api, scene, leads=range(2))

    def test_unacknowledged_lost_task_is_in_doubt(self, api: SandboxApi, tmp_path: Path) -> None:
        """404 is believed only when the task is no longer young, and then nobody knows whether it was charged."""
        api.fault("lost-task", 1, "post")

        async def scene(harness: LoopHarness) -> None:
            await harness.work()
            counts = harness.books.ledger.counts()
            assert (counts[State.IN_DOUBT], sum(counts.values())) == (1, 3)
            assert harness.books.money[1] > 0
            (age,) = harness.books.one("SELECT settled_ms - submitted_ms FROM attempts WHERE state = 'in_doubt'")
            assert age >= SHORT_TIMEOUTS.young_s * 1000
            assert harness.execution.in_flight == 0

        run_scenario(tmp_path, api, scene, leads=range(3))

    def test_acknowledged_lost_task_is_expired(self, api: SandboxApi, tmp_path: Path) -> None:
        """The API knew it once, so it was accepted, and its result is gone."""

        async def scene(harness: LoopHarness) -> None:
            harness.left_behind(("forgotten", 90.0), alive=True)
            await harness.adopt(harness.poller())
            assert assert_counts(harness, expired=1)

        run_scenario(tmp_path, api, scene, leads=range(1))

    def test_young_unknown_task_is_awaited(self, api: SandboxApi, tmp_path: Path) -> None:
        """A young task may not be known yet."""
        api.fault("late-task", 2, "post", seconds=0.3)

        async def scene(harness: LoopHarness) -> None:
            await harness.work()
            assert set(harness.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}

        run_scenario(tmp_path, api, scene, leads=range(2))

    def test_acknowledged_flag_is_stored(self, tmp_path: Path) -> None:
        """The next execution knows that the API has known it."""

        async def scene(harness: LoopHarness) -> None:
            await harness.work(harness.poller(patience_s=0.1))
            assert [task.seen_alive for task in harness.books.ledger.tasks()] == [True, True]

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scene, leads=range(2))

    @pytest.mark.parametrize("fault", ["error-before", "rate-limit-bare", "reset-before"])
    def test_failed_poll_is_repeated(self, api: SandboxApi, tmp_path: Path, fault: str) -> None:
        """Whatever happens to a GET costs nothing: it is repeated until the answer is there."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 3)
            harness.api.fault(fault, 3, "get")
            await harness.adopt(harness.poller())
            assert set(harness.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}
            assert harness.execution.reasons == {}

        run_scenario(tmp_path, api, scene, leads=range(3), timing=SHORT_TIMEOUTS)

    def test_free_failures_end_as_failed(self, tmp_path: Path) -> None:
        """Edge g: asked again, in all `max_attempts` times, and then the API's word stands."""

        async def scene(harness: LoopHarness) -> None:
            await harness.work(harness.poller(max_attempts=1))
            assert assert_counts(harness, failed=4)
            assert harness.watch.posts == 4
            assert harness.books.money[:3] == (0, 0, 0)

        with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
            run_scenario(tmp_path, api, scene, leads=range(4))


class TestOrder:
    """Who is asked when."""

    def test_nearest_expiry_polled_first(self, api: SandboxApi, tmp_path: Path) -> None:
        """Of the tasks that are due, the oldest goes first, whatever order they came in."""

        async def scene(harness: LoopHarness) -> None:
            ages = [30.0, 10.0, 50.0, 20.0, 40.0]
            harness.left_behind(*((f"task-{age:.0f}", age) for age in ages))
            poller = harness.poller()
            poller.adopt(harness.books.ledger.tasks()[::-1], asked_before=False)
            poller.last_round = True
            await harness.execution.until_leaving(poller.run())
            # A 404 is asked for once more over a connection of its own.
            assert list(dict.fromkeys(harness.watch.asked)) == ["task-50", "task-40", "task-30", "task-20", "task-10"]

        run_scenario(tmp_path, api, scene, leads=range(5), rate=50.0, timing=replace(SHORT_TIMEOUTS, young_s=60))

    def test_last_round_polls_each_once(self, tmp_path: Path) -> None:
        """What still runs is left for later and is no failure of this execution."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 40)
            await harness.rescue(harness.poller())
            assert sorted(harness.watch.asked) == sorted(set(harness.watch.asked))
            assert len(harness.watch.asked) == 40
            assert assert_counts(harness, submitted=40)
            assert (harness.execution.in_flight, harness.execution.reasons) == (0, {})

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scene, leads=range(40))

    def test_last_round_repeats_after_429(self, api: SandboxApi, tmp_path: Path) -> None:
        """Each task of an earlier execution is really asked before anything new is bought."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 20)
            harness.api.fault("rate-limit-bare", 15, "get")
            await harness.rescue(harness.poller())
            assert set(harness.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}

        run_scenario(tmp_path, api, scene, leads=range(20), timing=SHORT_TIMEOUTS)

    def test_last_round_keeps_no_data_open(self, tmp_path: Path) -> None:
        """Without its grace it is provisional: the next loop asks again."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 2)
            await harness.rescue(harness.poller())
            assert assert_counts(harness, submitted=2)
            await harness.adopt(harness.poller(), asked_before=True)
            assert assert_counts(harness, not_found=2)

        with serve_api(tmp_path / "api.db", hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=None) as api:
            run_scenario(tmp_path, api, scene, leads=range(2))

    def test_finish_early_polls_all_once(self, tmp_path: Path) -> None:
        """After a signal even a task that is not due is asked, and then the loop ends."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 5)
            poller = harness.poller()
            poller.adopt(harness.books.ledger.tasks(), asked_before=True)
            harness.execution.poll_times.SHORTEST_S = harness.execution.poll_times.LONGEST_S = 60.0
            running = asyncio.create_task(poller.run())
            await wait_until(lambda: len(harness.watch.asked) == 5 and not poller._asking)
            poller.hurry()
            await asyncio.wait_for(running, 10)  # not the minute after which they are due
            assert sorted(harness.watch.asked[:5]) == sorted(harness.watch.asked[5:])
            assert (harness.execution.in_flight, harness.execution.reasons) == (0, {})

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scene, leads=range(5))


class TestTimeouts:
    """When waiting ends."""

    def test_task_timeout_ends_waiting(self, tmp_path: Path) -> None:
        """Beyond the patience the run goes on without it, says so with exit 13, and the ledger keeps the task."""

        async def scene(harness: LoopHarness) -> None:
            await harness.work(harness.poller(patience_s=0.3))
            assert set(harness.execution.reasons) == {Exit.TIME}
            assert assert_counts(harness, submitted=3)
            assert harness.execution.in_flight == 0

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scene, leads=range(3))

    def test_old_task_is_polled_once(self, tmp_path: Path) -> None:
        """What an earlier execution lost patience with costs this one no more than another poll."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 1)
            await harness.rescue(harness.poller(patience_s=0.0))
            await asyncio.sleep(0.01)
            await harness.adopt(harness.poller(patience_s=0.0), asked_before=True)
            assert len(harness.watch.asked) == 2
            assert set(harness.execution.reasons) == {Exit.TIME}
            assert harness.execution.in_flight == 0

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scene, leads=range(1))

    @pytest.mark.parametrize("fault", ["error-before", "rate-limit-bare"])
    def test_outage_ends_polling(self, api: SandboxApi, tmp_path: Path, fault: str) -> None:
        """Without one good answer for long, the run ends with exit 4 and the tasks stay for the next."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 3)
            harness.api.fault(fault, 10_000, "get")
            await harness.adopt(harness.poller())
            assert set(harness.execution.reasons) == {Exit.API}
            assert assert_counts(harness, submitted=3)

        run_scenario(tmp_path, api, scene, leads=range(3), timing=ILL)

    @pytest.mark.parametrize("fault", ["unauthorized", "forbidden"])
    def test_wrong_key_waits_for_posts_in_flight(self, tmp_path: Path, fault: str) -> None:
        """The POSTs on the wire are written down first: cut off, they would be in doubt."""

        async def scene(harness: LoopHarness) -> None:
            work = asyncio.create_task(harness.work())
            await wait_until(lambda: harness.execution.in_flight > 0 and harness.watch.on_the_wire > 0)
            harness.api.fault(fault, 10_000, "get")
            await work
            assert set(harness.execution.reasons) == {Exit.KEY}
            assert await harness.journal.do(Ledger.recover, 1) == 0
            counts = harness.books.ledger.counts()
            assert State.IN_DOUBT not in counts
            assert counts[State.SUBMITTED] > 0
            assert counts[State.PENDING] > 0

        slow = (Fault("slow", 1.0, "post", {"seconds": 0.3}),)
        with serve_api(tmp_path / "api.db", faults=slow, latency="fixed(60)") as api:
            run_scenario(tmp_path, api, scene, leads=range(200))

    def test_clock_set_back(self, api: SandboxApi, tmp_path: Path) -> None:
        """A task from the future is as new as can be, and is asked soon."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 2)
            clock = harness.execution.clock
            assert isinstance(clock, ShiftedClock)
            clock.shift_ms = -200_000
            started = time.monotonic()
            await harness.adopt(harness.poller(), asked_before=True)
            assert time.monotonic() - started < 60
            assert set(harness.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}

        run_scenario(tmp_path, api, scene, leads=range(2), clock=ShiftedClock())

    def test_abort_cancels_polls(self, tmp_path: Path) -> None:
        """Even a poll whose answer does not come is dropped; its task stays."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 3)
            work = asyncio.create_task(harness.adopt(harness.poller()))
            await wait_until(lambda: len(harness.watch.asked) == 3)
            started = time.monotonic()
            harness.execution.leave()
            await work
            assert time.monotonic() - started < 3
            assert assert_counts(harness, submitted=3)

        slow = (Fault("slow", 1.0, "get", {"seconds": 5}),)
        with serve_api(tmp_path / "api.db", faults=slow) as api:
            run_scenario(tmp_path, api, scene, leads=range(3), timing=Timing())

    @pytest.mark.long
    def test_waiting_uses_no_cpu(self, tmp_path: Path) -> None:
        """Between polls the loop sleeps, and polls become rare."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 50)
            harness.execution.poll_times = PollTimes()
            with patch.object(Execution, "wait_change", autospec=True, side_effect=Execution.wait_change) as waits:
                await harness.adopt(harness.poller())
            polls = len(harness.watch.asked)
            assert polls <= 50 * 5
            # Each poll begins and ends, and each second the loop looks around; it never turns in between.
            assert waits.call_count <= 2 * polls + 60
            assert State.SUBMITTED not in harness.books.ledger.counts()

        with serve_api(tmp_path / "api.db", latency="fixed(2)") as api:
            run_scenario(tmp_path, api, scene, leads=range(50))

    def test_deferred_polls_run_after_submits(self, tmp_path: Path) -> None:
        """A poll that was put off for a slot's sake is not put off at the end of the run."""

        async def scene(harness: LoopHarness) -> None:
            for latency in (0.5, 1.0, 1.5, 2.0, 3.0) * 10:
                harness.execution.poll_times.finished(0.9 * latency, latency)
            assert harness.execution.poll_price is Price.HIGH
            await harness.dispatcher(poller := harness.poller(), limit=3).run()
            meant = min(due for due, _, _ in poller._due)
            poller.no_more = True
            poller._relax()
            assert max(due for due, _, _ in poller._due) < meant

        with serve_api(tmp_path / "api.db") as api:
            run_scenario(tmp_path, api, scene, leads=range(3), rate=20.0)

    def test_ledger_error_stops_poller(self, api: SandboxApi, tmp_path: Path) -> None:
        """An answer that cannot be written is not counted; the error comes out bare."""

        async def scene(harness: LoopHarness) -> None:
            await submit_as_earlier_run(harness, 40)
            harness.books.ledger._db.execute("PRAGMA query_only = 1")
            with pytest.raises(EnrichError, match="cannot be written"):
                await harness.adopt(harness.poller())
            assert harness.execution.tally.settled == {}
            harness.books.ledger._db.execute("PRAGMA query_only = 0")
            assert assert_counts(harness, submitted=40)

        run_scenario(tmp_path, api, scene, leads=range(40))


@dataclass(slots=True)
class ShiftedClock(SystemClock):
    """A machine's clock that somebody sets."""

    shift_ms: int = 0

    def now_ms(self) -> int:
        """Tell the time as it was set."""
        return time.time_ns() // 1_000_000 + self.shift_ms
