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
from tests.harness import HASTY, ILL, Api, serving
from tests.loops import Floor, at_work, until

LEDGER = "ledger.db"


def play(path: Path, api: Api, scene: Callable[[Floor], Coroutine[Any, Any, None]], **knobs: Any) -> None:
    """Play a scene on one execution."""

    async def played() -> None:
        async with at_work(api, path / LEDGER, **knobs) as floor:
            await scene(floor)

    asyncio.run(played())


def same(floor: Floor, **counts: int) -> bool:
    """Compare the ledger's counts."""
    return floor.books.ledger.counts() == {State(name): count for name, count in counts.items()}


async def submitted(floor: Floor, count: int) -> None:
    """Submit requests as an earlier execution did, and forget them."""
    await floor.dispatcher(floor.poller(), limit=count).run()
    floor.execution.in_flight = 0
    assert same(floor, submitted=count)


class TestAnswers:
    """What a task says, and what becomes of its request."""

    def test_every_answer_is_settled_at_its_price(self, tmp_path: Path) -> None:
        """Found, missed and failed: the ledger's credits are those that the API charged."""

        async def scene(floor: Floor) -> None:
            await floor.work()
            assert floor.execution.in_flight == 0
            counts = floor.books.ledger.counts()
            assert counts == floor.execution.tally.settled
            assert sum(counts.values()) == 60
            spent, reserved, unknown, _ = floor.books.money
            assert (spent, reserved, unknown) == (floor.execution.tally.spent, 0, 0)
            assert spent / MICROS == pytest.approx(floor.api.audit()["credits_charged"])

        with serving(tmp_path / "api.db", latency="uniform(0,0.2)", failure_rate=0.3) as api:
            play(tmp_path, api, scene, leads=range(60))
            assert api.audit()["paid_twice"] == 0

    @pytest.mark.parametrize(("lasting", "polls"), [(None, 6), (0.1, 3)])
    def test_no_data_counts_as_a_miss_after_a_grace(self, tmp_path: Path, lasting: float | None, polls: int) -> None:
        """It is asked again for a while; then it is a miss that is settled at its price."""

        async def scene(floor: Floor) -> None:
            await floor.work()
            assert same(floor, not_found=3)
            assert floor.books.money[:3] == (0, 0, 0)
            assert len(floor.watch.asked) >= polls
            assert floor.books.one("SELECT sum(seen_alive) FROM attempts") == (3,)

        with serving(tmp_path / "api.db", hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=lasting) as api:
            play(tmp_path, api, scene, leads=range(3))

    def test_statuses_never_seen_before_are_still_running(self, api: Api, tmp_path: Path) -> None:
        """An odd word is no end: the task is asked until it has one."""
        api.fault("odd-status", 3, "post", polls=3)

        async def scene(floor: Floor) -> None:
            await floor.work()
            assert set(floor.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}
            assert len(floor.watch.asked) == 12

        play(tmp_path, api, scene, leads=range(3))

    @pytest.mark.parametrize("expired_as", ["410", "gone"])
    def test_a_result_that_was_fetched_too_late_is_expired(self, tmp_path: Path, expired_as: str) -> None:
        """410 and the status `gone` say the same; the price is not known and stays reserved."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 2)
            reserved = floor.books.money[1]
            floor.api.advance(3 * 86_400)
            await floor.adopt(floor.poller())
            assert same(floor, expired=2)
            assert floor.books.money == (0, reserved, 2, 2)
            assert floor.execution.tally.settled == {State.EXPIRED: 2}

        with serving(tmp_path / "api.db", expired_as=expired_as) as api:
            play(tmp_path, api, scene, leads=range(2))

    def test_a_lost_task_that_was_never_seen_is_in_doubt(self, api: Api, tmp_path: Path) -> None:
        """404 is believed only when the task is no longer young, and then nobody knows whether it was charged."""
        api.fault("lost-task", 1, "post")

        async def scene(floor: Floor) -> None:
            await floor.work()
            counts = floor.books.ledger.counts()
            assert (counts[State.IN_DOUBT], sum(counts.values())) == (1, 3)
            assert floor.books.money[1] > 0
            (age,) = floor.books.one("SELECT settled_ms - submitted_ms FROM attempts WHERE state = 'in_doubt'")
            assert age >= HASTY.young_s * 1000
            assert floor.execution.in_flight == 0

        play(tmp_path, api, scene, leads=range(3))

    def test_a_lost_task_that_was_seen_is_expired(self, api: Api, tmp_path: Path) -> None:
        """The API knew it once, so it was accepted, and its result is gone."""

        async def scene(floor: Floor) -> None:
            floor.left_behind(("forgotten", 90.0), alive=True)
            await floor.adopt(floor.poller())
            assert same(floor, expired=1)

        play(tmp_path, api, scene, leads=range(1))

    def test_a_task_that_is_late_is_waited_for(self, api: Api, tmp_path: Path) -> None:
        """A young task may not be known yet."""
        api.fault("late-task", 2, "post", seconds=0.3)

        async def scene(floor: Floor) -> None:
            await floor.work()
            assert set(floor.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}

        play(tmp_path, api, scene, leads=range(2))

    def test_a_task_once_seen_is_remembered_as_such(self, tmp_path: Path) -> None:
        """The next execution knows that the API has known it."""

        async def scene(floor: Floor) -> None:
            await floor.work(floor.poller(patience_s=0.1))
            assert [task.seen_alive for task in floor.books.ledger.tasks()] == [True, True]

        with serving(tmp_path / "api.db", latency="fixed(60)") as api:
            play(tmp_path, api, scene, leads=range(2))

    @pytest.mark.parametrize("fault", ["error-before", "rate-limit-bare", "reset-before"])
    def test_a_poll_that_fails_is_made_again(self, api: Api, tmp_path: Path, fault: str) -> None:
        """Whatever happens to a GET costs nothing: it is repeated until the answer is there."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 3)
            floor.api.fault(fault, 3, "get")
            await floor.adopt(floor.poller())
            assert set(floor.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}
            assert floor.execution.reasons == {}

        play(tmp_path, api, scene, leads=range(3), timing=HASTY)

    def test_failures_at_no_charge_end_as_failed(self, tmp_path: Path) -> None:
        """Edge g: asked again, in all `max_attempts` times, and then the API's word stands."""

        async def scene(floor: Floor) -> None:
            await floor.work(floor.poller(max_attempts=1))
            assert same(floor, failed=4)
            assert floor.watch.posts == 4
            assert floor.books.money[:3] == (0, 0, 0)

        with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
            play(tmp_path, api, scene, leads=range(4))


class TestOrder:
    """Who is asked when."""

    def test_the_nearest_expiry_is_asked_first(self, api: Api, tmp_path: Path) -> None:
        """Of the tasks that are due, the oldest goes first, whatever order they came in."""

        async def scene(floor: Floor) -> None:
            ages = [30.0, 10.0, 50.0, 20.0, 40.0]
            floor.left_behind(*((f"task-{age:.0f}", age) for age in ages))
            poller = floor.poller()
            poller.adopt(floor.books.ledger.tasks()[::-1], asked_before=False)
            poller.last_round = True
            await floor.execution.until_leaving(poller.run())
            # A 404 is asked for once more over a connection of its own.
            assert list(dict.fromkeys(floor.watch.asked)) == ["task-50", "task-40", "task-30", "task-20", "task-10"]

        play(tmp_path, api, scene, leads=range(5), rate=50.0, timing=replace(HASTY, young_s=60))

    def test_the_last_round_asks_each_once(self, tmp_path: Path) -> None:
        """What still runs is left for later and is no failure of this execution."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 40)
            await floor.rescue(floor.poller())
            assert sorted(floor.watch.asked) == sorted(set(floor.watch.asked))
            assert len(floor.watch.asked) == 40
            assert same(floor, submitted=40)
            assert (floor.execution.in_flight, floor.execution.reasons) == (0, {})

        with serving(tmp_path / "api.db", latency="fixed(60)") as api:
            play(tmp_path, api, scene, leads=range(40))

    def test_a_429_is_not_the_answer_that_the_last_round_is_for(self, api: Api, tmp_path: Path) -> None:
        """Each task of an earlier execution is really asked before anything new is bought."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 20)
            floor.api.fault("rate-limit-bare", 15, "get")
            await floor.rescue(floor.poller())
            assert set(floor.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}

        play(tmp_path, api, scene, leads=range(20), timing=HASTY)

    def test_the_last_round_does_not_make_a_miss_of_no_data(self, tmp_path: Path) -> None:
        """Without its grace it is provisional: the next loop asks again."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 2)
            await floor.rescue(floor.poller())
            assert same(floor, submitted=2)
            await floor.adopt(floor.poller(), asked_before=True)
            assert same(floor, not_found=2)

        with serving(tmp_path / "api.db", hit_rate=0.0, miss_kinds=("no_data",), no_data_seconds=None) as api:
            play(tmp_path, api, scene, leads=range(2))

    def test_hurrying_asks_everyone_once_more(self, tmp_path: Path) -> None:
        """After a signal even a task that is not due is asked, and then the loop ends."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 5)
            poller = floor.poller()
            poller.adopt(floor.books.ledger.tasks(), asked_before=True)
            floor.execution.poll_times.SHORTEST_S = floor.execution.poll_times.LONGEST_S = 60.0
            running = asyncio.create_task(poller.run())
            await until(lambda: len(floor.watch.asked) == 5 and not poller._asking)
            poller.hurry()
            await asyncio.wait_for(running, 10)  # not the minute after which they are due
            assert sorted(floor.watch.asked[:5]) == sorted(floor.watch.asked[5:])
            assert (floor.execution.in_flight, floor.execution.reasons) == (0, {})

        with serving(tmp_path / "api.db", latency="fixed(60)") as api:
            play(tmp_path, api, scene, leads=range(5))


class TestPatience:
    """When waiting ends."""

    def test_a_task_that_runs_too_long_no_longer_holds_the_run(self, tmp_path: Path) -> None:
        """Beyond the patience the run goes on without it, says so with exit 13, and the ledger keeps the task."""

        async def scene(floor: Floor) -> None:
            await floor.work(floor.poller(patience_s=0.3))
            assert set(floor.execution.reasons) == {Exit.TIME}
            assert same(floor, submitted=3)
            assert floor.execution.in_flight == 0

        with serving(tmp_path / "api.db", latency="fixed(60)") as api:
            play(tmp_path, api, scene, leads=range(3))

    def test_a_task_that_was_asked_and_is_too_old_is_not_waited_for(self, tmp_path: Path) -> None:
        """What an earlier execution lost patience with costs this one no more than another poll."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 1)
            await floor.rescue(floor.poller(patience_s=0.0))
            await asyncio.sleep(0.01)
            await floor.adopt(floor.poller(patience_s=0.0), asked_before=True)
            assert len(floor.watch.asked) == 2
            assert set(floor.execution.reasons) == {Exit.TIME}
            assert floor.execution.in_flight == 0

        with serving(tmp_path / "api.db", latency="fixed(60)") as api:
            play(tmp_path, api, scene, leads=range(1))

    @pytest.mark.parametrize("fault", ["error-before", "rate-limit-bare"])
    def test_an_outage_is_not_waited_for(self, api: Api, tmp_path: Path, fault: str) -> None:
        """Without one good answer for long, the run ends with exit 4 and the tasks stay for the next."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 3)
            floor.api.fault(fault, 10_000, "get")
            await floor.adopt(floor.poller())
            assert set(floor.execution.reasons) == {Exit.API}
            assert same(floor, submitted=3)

        play(tmp_path, api, scene, leads=range(3), timing=ILL)

    @pytest.mark.parametrize("fault", ["unauthorized", "forbidden"])
    def test_a_refused_key_stops_the_run_but_cuts_off_no_post(self, tmp_path: Path, fault: str) -> None:
        """The POSTs on the wire are written down first: cut off, they would be in doubt."""

        async def scene(floor: Floor) -> None:
            work = asyncio.create_task(floor.work())
            await until(lambda: floor.execution.in_flight > 0 and floor.watch.on_the_wire > 0)
            floor.api.fault(fault, 10_000, "get")
            await work
            assert set(floor.execution.reasons) == {Exit.KEY}
            assert await floor.journal.do(Ledger.recover, 1) == 0
            counts = floor.books.ledger.counts()
            assert State.IN_DOUBT not in counts
            assert counts[State.SUBMITTED] > 0
            assert counts[State.PENDING] > 0

        slow = (Fault("slow", 1.0, "post", {"seconds": 0.3}),)
        with serving(tmp_path / "api.db", faults=slow, latency="fixed(60)") as api:
            play(tmp_path, api, scene, leads=range(200))

    def test_a_clock_that_is_set_back_holds_nobody_up(self, api: Api, tmp_path: Path) -> None:
        """A task from the future is as new as can be, and is asked soon."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 2)
            clock = floor.execution.clock
            assert isinstance(clock, ShiftedClock)
            clock.shift_ms = -200_000
            started = time.monotonic()
            await floor.adopt(floor.poller(), asked_before=True)
            assert time.monotonic() - started < 60
            assert set(floor.books.ledger.counts()) <= {State.FOUND, State.NOT_FOUND}

        play(tmp_path, api, scene, leads=range(2), clock=ShiftedClock())

    def test_leaving_ends_all_waiting_at_once(self, tmp_path: Path) -> None:
        """Even a poll whose answer does not come is dropped; its task stays."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 3)
            work = asyncio.create_task(floor.adopt(floor.poller()))
            await until(lambda: len(floor.watch.asked) == 3)
            started = time.monotonic()
            floor.execution.leave()
            await work
            assert time.monotonic() - started < 3
            assert same(floor, submitted=3)

        slow = (Fault("slow", 1.0, "get", {"seconds": 5}),)
        with serving(tmp_path / "api.db", faults=slow) as api:
            play(tmp_path, api, scene, leads=range(3), timing=Timing())

    @pytest.mark.long
    def test_waiting_for_slow_tasks_costs_no_processor_time(self, tmp_path: Path) -> None:
        """Between polls the loop sleeps, and polls become rare."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 50)
            floor.execution.poll_times = PollTimes()
            with patch.object(Execution, "wait_change", autospec=True, side_effect=Execution.wait_change) as waits:
                await floor.adopt(floor.poller())
            polls = len(floor.watch.asked)
            assert polls <= 50 * 5
            # Each poll begins and ends, and each second the loop looks around; it never turns in between.
            assert waits.call_count <= 2 * polls + 60
            assert State.SUBMITTED not in floor.books.ledger.counts()

        with serving(tmp_path / "api.db", latency="fixed(2)") as api:
            play(tmp_path, api, scene, leads=range(50))

    def test_who_gave_way_to_submits_is_asked_when_none_waits_any_more(self, tmp_path: Path) -> None:
        """A poll that was put off for a slot's sake is not put off at the end of the run."""

        async def scene(floor: Floor) -> None:
            for latency in (0.5, 1.0, 1.5, 2.0, 3.0) * 10:
                floor.execution.poll_times.finished(0.9 * latency, latency)
            assert floor.execution.poll_price is Price.HIGH
            await floor.dispatcher(poller := floor.poller(), limit=3).run()
            meant = min(due for due, _, _ in poller._due)
            poller.no_more = True
            poller._relax()
            assert max(due for due, _, _ in poller._due) < meant

        with serving(tmp_path / "api.db") as api:
            play(tmp_path, api, scene, leads=range(3), rate=20.0)

    def test_a_broken_ledger_ends_the_loop_with_its_error(self, api: Api, tmp_path: Path) -> None:
        """An answer that cannot be written is not counted; the error comes out bare."""

        async def scene(floor: Floor) -> None:
            await submitted(floor, 40)
            floor.books.ledger._db.execute("PRAGMA query_only = 1")
            with pytest.raises(EnrichError, match="cannot be written"):
                await floor.adopt(floor.poller())
            assert floor.execution.tally.settled == {}
            floor.books.ledger._db.execute("PRAGMA query_only = 0")
            assert same(floor, submitted=40)

        play(tmp_path, api, scene, leads=range(40))


@dataclass(slots=True)
class ShiftedClock(SystemClock):
    """A machine's clock that somebody sets."""

    shift_ms: int = 0

    def now_ms(self) -> int:
        """Tell the time as it was set."""
        return time.time_ns() // 1_000_000 + self.shift_ms
