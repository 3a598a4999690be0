"""The dispatcher: each request is sent once, within every limit, and what became of it is written down."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enrich.api.client import POSTS_ON_THE_WIRE
from enrich.errors import EnrichError, Exit, LedgerFailed
from enrich.model import Call, State, Wanted
from enrich.pace import BURST_S
from enrich.sandbox.faults import Fault
from enrich.store.ledger import Ledger
from tests.books import CALL, Books, wanted
from tests.cases import first_quick
from tests.harness import HASTY, ILL, SILENT, Api, serving
from tests.loops import WORST, at_work, until

LEDGER = "ledger.db"


def slowly(seconds: float) -> tuple[Fault, ...]:
    """Let every POST take so long."""
    return (Fault("slow", 1.0, "post", {"seconds": seconds}),)


def nothing_is_reserved(books: Books) -> bool:
    """Tell whether the execution has set nothing aside."""
    return books.money[1] == 0


#: Seconds of processor time in a second: a loop that spins would use most of it.
IDLE = 0.15


class TestLimits:
    """How many POSTs leave, and when none does any more."""

    @pytest.mark.parametrize(("in_flight", "expected_on_the_wire"), first_quick(1, [(200, POSTS_ON_THE_WIRE), (7, 7)]))
    def test_never_too_many_at_once(self, tmp_path: Path, in_flight: int, expected_on_the_wire: int) -> None:
        """At most 32 POSTs are on the wire and `in_flight` tasks at the API, and the room is used."""

        async def scene(api: Api) -> None:
            async with at_work(api, tmp_path / LEDGER, range(100), in_flight=in_flight) as floor:
                floor.watch.together = expected_on_the_wire
                await floor.work()
                assert floor.watch.most_on_the_wire == expected_on_the_wire
                assert floor.watch.most_at_the_api <= in_flight
                assert (floor.execution.on_the_wire, floor.execution.in_flight) == (0, 0)
                assert sum(floor.books.ledger.counts().values()) == floor.execution.tally.submitted == 100

        with serving(tmp_path / "api.db", latency="fixed(0.05)") as api:
            asyncio.run(scene(api))
            assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (100, 0)

    def test_the_rate_is_kept(self, api: Api, tmp_path: Path) -> None:
        """Submits and polls together stay below the job's `requests_per_second`."""

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(15), rate=40.0) as floor:
                started = time.monotonic()
                await floor.work()
                elapsed = time.monotonic() - started
                assert 30 <= floor.watch.posts + len(floor.watch.asked) <= 1 + 40 * (elapsed + BURST_S)

        asyncio.run(scene())

    def test_a_limit_counts_what_may_have_been_bought(self, api: Api, tmp_path: Path) -> None:
        """`--limit` is reached exactly, doubts included, whatever was refused on the way; the rest stays pending."""
        api.fault("rate-limit-bare", 3, "post")
        api.fault("error-after", 2, "post")

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(50)) as floor:
                await floor.work(limit=40)
                assert floor.execution.tally.submitted == 38
                assert floor.execution.reasons == {}
                counts = floor.books.ledger.counts()
                assert (counts[State.IN_DOUBT], counts[State.PENDING]) == (2, 10)

        asyncio.run(scene())
        assert api.audit()["accepted"] == 40

    def test_with_nothing_to_send_it_ends_at_once(self, api: Api, tmp_path: Path) -> None:
        """An empty queue and nothing in flight: there is nothing to wait for."""

        async def scene() -> float:
            async with at_work(api, tmp_path / LEDGER) as floor:
                started = time.monotonic()
                await floor.work()
                return time.monotonic() - started

        assert asyncio.run(scene()) < 5
        assert api.audit()["accepted"] == 0

    def test_the_cap_waits_for_what_is_in_flight(self, tmp_path: Path) -> None:
        """Answers that cost less than reserved make room again; when none can, the cap is reached."""
        cap = 3 * WORST

        async def scene(api: Api) -> int:
            async with at_work(api, tmp_path / LEDGER, range(50), cap=cap) as floor:
                await floor.work()
                assert floor.watch.most_at_the_api <= 3
                assert Exit.CREDITS in floor.execution.reasons
                spent, reserved, _, submitted = floor.books.money
                assert reserved == 0
                assert cap - WORST < spent <= cap
                assert submitted > 3
                return spent

        with serving(tmp_path / "api.db", latency="fixed(0.02)") as api:
            spent = asyncio.run(scene(api))
            assert api.audit()["credits_charged"] == pytest.approx(spent / 1e6)

    def test_a_cap_that_is_enough_is_not_reached(self, api: Api, tmp_path: Path) -> None:
        """The last request is sent though the cap was in the way for a while."""

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(6), cap=8 * WORST // 2) as floor:
                await floor.work()
                assert floor.execution.reasons == {}
                assert floor.execution.tally.submitted == 6

        asyncio.run(scene())

    def test_unknown_prices_use_the_cap_up(self, tmp_path: Path) -> None:
        """An answer that does not tell its price keeps its reservation: the cap is never exceeded on faith."""

        async def scene(api: Api) -> None:
            async with at_work(api, tmp_path / LEDGER, range(9), cap=4 * WORST) as floor:
                await floor.work()
                assert floor.books.money == (0, 4 * WORST, 4, 4)
                assert Exit.CREDITS in floor.execution.reasons

        with serving(tmp_path / "api.db", hide_credits=True, hit_rate=0.0) as api:
            asyncio.run(scene(api))


class TestAnswers:
    """What each answer to a POST means for its request."""

    @pytest.mark.parametrize("fault", first_quick(1, ["rate-limit-bare", "rate-limit", "redirect"]))
    def test_a_storm_of_refusals_loses_nothing(self, api: Api, tmp_path: Path, fault: str) -> None:
        """What was not accepted is sent again, is paid once, and counts as no attempt."""
        count = 40 if fault == "rate-limit-bare" else 2
        api.fault(fault, count, "post")

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(45)) as floor:
                await floor.work()
                assert floor.execution.reasons == {}
                assert floor.execution.tally.rate_limited == (0 if fault == "redirect" else count)
                assert floor.books.all("SELECT DISTINCT attempts FROM requests") == [(1,)]
                refused = floor.books.one("SELECT count(*), sum(credits) FROM attempts WHERE state = 'refused'")
                assert refused == (count, 0)
                assert nothing_is_reserved(floor.books)

        asyncio.run(scene())
        assert (api.audit()["accepted"], api.audit()["accepted_more_than_once"]) == (45, 0)

    @pytest.mark.parametrize(
        "fault",
        first_quick(2, ["error-after", "reset-after", "html-200", "broken-json", "no-task-id", "silence-after"]),
    )
    def test_an_ambiguous_answer_is_never_sent_again(self, api: Api, tmp_path: Path, fault: str) -> None:
        """It is in doubt and keeps its reservation; the others go on."""
        api.fault(fault, 2, "post")
        timing = SILENT if fault == "silence-after" else HASTY

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(20), timing=timing) as floor:
                await floor.work()
                assert floor.execution.reasons == {}
                assert floor.books.ledger.counts()[State.IN_DOUBT] == 2
                assert floor.books.money[1] == 2 * WORST
                assert floor.watch.posts == 20

        asyncio.run(scene())
        assert (api.audit()["accepted"], api.audit()["accepted_more_than_once"]) == (20, 0)

    def test_an_ill_api_is_left_alone(self, api: Api, tmp_path: Path) -> None:
        """After the first burst one POST at a time tries; when it stays ill for too long nothing more is sent."""
        api.fault("error-before", 1000, "post", status=503)

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(200), timing=ILL) as floor:
                await floor.work()
                assert Exit.API in floor.execution.reasons
                doubtful = floor.books.ledger.counts()[State.IN_DOUBT]
                assert 0 < doubtful == floor.watch.posts <= POSTS_ON_THE_WIRE + 12

        asyncio.run(scene())

    def test_an_api_that_recovers_is_used_again(self, api: Api, tmp_path: Path) -> None:
        """One good answer closes the breaker, and the rest is sent side by side."""
        api.fault("error-before", 34, "post")

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(100)) as floor:
                await floor.work()
                assert floor.execution.reasons == {}
                assert floor.books.ledger.counts()[State.IN_DOUBT] == 34
                assert floor.execution.tally.submitted == 66

        asyncio.run(scene())

    def test_an_api_that_only_throttles_is_given_up(self, api: Api, tmp_path: Path) -> None:
        """Nothing but 429 for as long as an outage may last ends the run; everything is pending again."""
        api.fault("rate-limit-bare", 100_000, "all")

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(50), timing=ILL) as floor:
                await floor.work()
                assert Exit.API in floor.execution.reasons
                assert floor.books.ledger.counts() == {State.PENDING: 50}

        asyncio.run(scene())

    def test_an_api_that_is_not_there_loses_nothing(self, api: Api, tmp_path: Path) -> None:
        """No connection means not sent: all is pending and nothing is reserved."""
        nowhere = replace(api, base_url="http://127.0.0.1:9/v1")

        async def scene() -> None:
            async with at_work(nowhere, tmp_path / LEDGER, range(50), timing=ILL) as floor:
                await floor.work()
                assert Exit.API in floor.execution.reasons
                assert floor.books.ledger.counts() == {State.PENDING: 50}
                assert nothing_is_reserved(floor.books)

        asyncio.run(scene())

    def test_a_param_that_is_named_fails_its_row_alone(self, api: Api, tmp_path: Path) -> None:
        """A 400 about a param fails that request at no cost; the others are sent."""

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER) as floor:
                batch = [*wanted(range(5)), Wanted(5, b"w" * 16, '{"first_name": "Ada"}')]
                floor.books.do(Ledger.enroll, CALL, batch)
                floor.books.do(Ledger.mark)
                await floor.work()
                counts = floor.books.ledger.counts()
                assert (counts[State.FAILED], sum(counts.values())) == (1, 6)
                error, credits_ = floor.books.one("SELECT error, credits FROM attempts WHERE state = 'failed'")
                assert "last_name" in error
                assert credits_ == 0
                assert nothing_is_reserved(floor.books)
                assert floor.execution.tally.settled[State.FAILED] == 1

        asyncio.run(scene())

    @pytest.mark.parametrize(
        ("call", "fault", "code"),
        first_quick(
            2,
            [
                (Call("nothing_getter", (833,)), None, Exit.USAGE),
                (Call("email_getter", (4711,)), None, Exit.USAGE),
                (CALL, "unauthorized", Exit.KEY),
                (CALL, "forbidden", Exit.KEY),
                (CALL, "no-credits", Exit.CREDITS),
            ],
        ),
        ids=["404", "400", "401", "403", "406"],
    )
    def test_what_no_request_can_pass_stops_the_run(
        self, api: Api, tmp_path: Path, call: Call, fault: str | None, code: Exit
    ) -> None:
        """The execution stops with its code; every request is pending again and costs nothing."""
        if fault:
            api.fault(fault, 1000, "post")

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(80)) as floor:
                await floor.work(call=call)
                assert set(floor.execution.reasons) == {code}
                assert floor.books.ledger.counts() == {State.PENDING: 80}
                assert nothing_is_reserved(floor.books)
                assert floor.watch.posts <= POSTS_ON_THE_WIRE

        asyncio.run(scene())
        assert api.audit()["accepted"] == 0

    def test_a_failure_at_no_charge_is_sent_again(self, tmp_path: Path) -> None:
        """Edge g: while something is in flight the dispatcher waits for what may come back."""

        async def scene(api: Api) -> None:
            async with at_work(api, tmp_path / LEDGER, range(10)) as floor:
                await floor.work(floor.poller(max_attempts=3))
                counts = floor.books.ledger.counts()
                assert set(counts) <= {State.FOUND, State.NOT_FOUND}
                assert 20 <= floor.watch.posts <= 30

        with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
            asyncio.run(scene(api))
            assert api.audit()["paid_twice"] == 0


class TestEnding:
    """Being stopped in the middle leaves no doubt that is not one."""

    def test_after_a_stop_nothing_more_leaves(self, tmp_path: Path) -> None:
        """What is on the wire is written down, the rest stays pending."""

        async def scene(api: Api) -> None:
            async with at_work(api, tmp_path / LEDGER, range(200)) as floor:
                work = asyncio.create_task(floor.work())
                await until(lambda: floor.watch.on_the_wire > 0)
                floor.execution.stop(Exit.INTERRUPTED, EnrichError("stop"))
                sent = floor.watch.posts
                await work
                assert floor.watch.posts == sent
                counts = floor.books.ledger.counts()
                assert counts.pop(State.PENDING) == 200 - sent
                assert set(counts) <= {State.FOUND, State.NOT_FOUND}

        with serving(tmp_path / "api.db", faults=slowly(0.2)) as api:
            asyncio.run(scene(api))

    @pytest.mark.parametrize("leave", [True, False], ids=["leave", "stop"])
    def test_what_was_claimed_but_not_sent_is_not_in_doubt(self, api: Api, tmp_path: Path, *, leave: bool) -> None:
        """An execution that ends between the intent and its POST takes the intent back."""

        async def scene() -> None:
            async with at_work(api, tmp_path / LEDGER, range(50)) as floor:
                begun, ended = threading.Event(), threading.Event()

                def busy(_: Ledger) -> None:
                    begun.set()
                    ended.wait(30)

                floor.journal.do(busy)
                await until(begun.is_set)
                work = asyncio.create_task(floor.work())
                await until(lambda: floor.journal._batches.qsize() > 0)  # the intents wait behind it
                if leave:
                    floor.execution.leave()
                else:
                    floor.execution.stop(Exit.INTERRUPTED, EnrichError("stop"))
                ended.set()
                await work
                assert await floor.journal.do(Ledger.recover, 1) == 0
                assert floor.books.ledger.counts() == {State.PENDING: 50}
                assert nothing_is_reserved(floor.books)
                assert floor.books.one("SELECT count(*) FROM attempts WHERE state = 'refused'")[0] > 0
                assert floor.watch.posts == 0

        asyncio.run(scene())

    def test_leaving_puts_in_doubt_only_what_is_on_the_wire(self, tmp_path: Path) -> None:
        """Whoever leaves without waiting has as many doubts as POSTs that were under way."""

        async def scene(api: Api) -> None:
            async with at_work(api, tmp_path / LEDGER, range(200)) as floor:
                work = asyncio.create_task(floor.work())
                await until(lambda: floor.watch.on_the_wire == POSTS_ON_THE_WIRE)
                floor.execution.leave()
                await work
                assert await floor.journal.do(Ledger.recover, 1) == POSTS_ON_THE_WIRE
                assert floor.books.money[1] == POSTS_ON_THE_WIRE * WORST

        with serving(tmp_path / "api.db", faults=slowly(30)) as api:
            asyncio.run(scene(api))

    def test_a_ledger_that_cannot_remember_ends_everything(self, api: Api, tmp_path: Path) -> None:
        """The first commit that fails is the last: its error comes out bare, and no POST leaves any more."""

        async def scene() -> int:
            async with at_work(api, tmp_path / LEDGER, range(2000)) as floor:
                (pages,) = floor.books.one("PRAGMA page_count")
                floor.books.ledger._db.execute(f"PRAGMA max_page_count = {pages + 5}")
                with pytest.raises(LedgerFailed, match="full"):
                    await floor.work()
                sent = floor.watch.posts
                await asyncio.sleep(0.2)
                assert floor.watch.posts == sent < 2000
                return sent

        sent = asyncio.run(scene())
        books = Books.open(tmp_path / LEDGER)
        books.do(Ledger.recover, 1)
        counts = books.ledger.counts()
        books.ledger.close()
        assert counts[State.PENDING] + sent >= 2000

    @pytest.mark.parametrize("waiting_for", first_quick(1, ["room", "cap", "queue", "rate"]))
    def test_waiting_costs_no_processor_time(self, tmp_path: Path, waiting_for: str) -> None:
        """While slow tasks run the loops sleep, whatever they wait for."""
        leads = range(60) if waiting_for != "queue" else range(20)
        knobs = {"room": {"in_flight": 20}, "cap": {"cap": 20 * WORST}, "queue": {}, "rate": {"rate": 10}}

        async def scene(api: Api) -> float:
            knob: dict[str, Any] = knobs[waiting_for]
            async with at_work(api, tmp_path / LEDGER, leads, **knob) as floor:
                work = asyncio.create_task(floor.work())
                used = 1.0
                for _ in range(5):  # on a busy machine the submitting may not be over at first
                    await asyncio.sleep(0.5)
                    before = time.thread_time()
                    await asyncio.sleep(1)
                    used = time.thread_time() - before
                    if used < IDLE:
                        break
                floor.execution.leave()
                await work
                return used

        with serving(tmp_path / "api.db", latency="fixed(60)") as api:
            assert asyncio.run(scene(api)) < IDLE


def test_what_was_not_sent_is_put_back_though_the_commit_is_lost(api: Api, tmp_path: Path) -> None:
    """The move is done again then, and knows again what it is about."""

    async def scene() -> None:
        async with at_work(api, tmp_path / LEDGER, range(3)) as floor:
            ledger, dispatcher = floor.books.ledger, floor.dispatcher(floor.poller())
            with ledger.transaction():
                dispatcher._claim_some(ledger, 3, 1, 0)
            ledger._db.begin()
            dispatcher._unclaim(ledger, 0)
            ledger.rollback()
            with ledger.transaction():
                dispatcher._unclaim(ledger, 0)
            assert ledger.counts() == {State.PENDING: 3}

    asyncio.run(scene())


def test_nothing_is_claimed_by_who_may_be_thought_gone(api: Api, tmp_path: Path) -> None:
    """Until it is sure of its lease again it waits, and writes nothing."""

    async def scene() -> None:
        async with at_work(api, tmp_path / LEDGER, range(3)) as floor:
            asked = 0

            def holds() -> bool:
                nonlocal asked
                asked += 1
                return asked > 2

            floor.execution.holds = holds
            await floor.work()
            assert floor.books.all("SELECT count(*) FROM attempts") == [(3,)]

    asyncio.run(scene())
