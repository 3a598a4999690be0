"""The dispatcher sends each request once, within every limit, and records its outcome."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from enrich.databar.client import MAX_POSTS_IN_FLIGHT
from enrich.errors import EnrichError, LedgerFailed
from enrich.exit_codes import ExitCode
from enrich.job.target import Target, TargetKind
from enrich.ledger import enroll, queries, queue, resume, transitions
from enrich.ledger.database import Database
from enrich.ledger.writer import LedgerWriter
from enrich.models import State
from enrich.run import rate_limit
from enrich.run.rate_limit import MAX_BURST_S
from enrich.sandbox.settings import Fault
from tests.support.cases import first_quick
from tests.support.ledger import CALL, DEFAULT_SELECTION, CommittingLedger, RowRequest, as_batch, fingerprint, params
from tests.support.run_loops import SANDBOX_MAX_PRICE, open_loops, wait_until
from tests.support.workspace import SHORT_OUTAGE_TIMEOUT, SHORT_POST_TIMEOUT, SHORT_TIMEOUTS, SandboxApi, serve_api

LEDGER = "ledger.db"


def delay_posts(seconds: float) -> tuple[Fault, ...]:
    """Return a fault that delays each POST by this many seconds."""
    return (Fault("slow", 1.0, "post", {"seconds": seconds}),)


def no_credits_reserved(ledger: CommittingLedger) -> bool:
    """Return whether the execution has no credits reserved."""
    return ledger.execution_counters[1] == 0


#: The allowed processor seconds per second; a busy loop would use almost all of it.
MAX_IDLE_CPU_S = 0.15


class TestLimits:
    """How many POSTs are sent, and when to stop."""

    @pytest.mark.parametrize(
        ("in_flight", "expected_on_the_wire"), first_quick(1, [(200, MAX_POSTS_IN_FLIGHT), (7, 7)])
    )
    def test_max_posts_and_open_tasks(self, tmp_path: Path, in_flight: int, expected_on_the_wire: int) -> None:
        """At most 32 POSTs and `in_flight` tasks are open at once, and that room is used."""

        async def scenario(api: SandboxApi) -> None:
            async with open_loops(api, tmp_path / LEDGER, range(40), in_flight=in_flight) as harness:
                harness.request_log.awaited_posts_in_flight = expected_on_the_wire
                await harness.run_loops()
                assert harness.request_log.max_posts_in_flight == expected_on_the_wire
                assert harness.request_log.max_open_tasks <= in_flight
                assert (harness.run_state.posts_in_flight, harness.run_state.open_tasks) == (0, 0)
                assert (
                    sum(queries.state_counts(harness.ledger.wrapped).values())
                    == harness.run_state.counters.submitted
                    == 40
                )

        with serve_api(tmp_path / "api.db", latency="fixed(0.05)") as api:
            asyncio.run(scenario(api))
            assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (40, 0)

    def test_kill_leaves_at_most_32_unconfirmed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A POST that is answered makes room for the next, whose claim is never committed before the acceptance."""
        submitting: list[int] = []
        commit = LedgerWriter._commit

        async def scenario(api: SandboxApi) -> None:
            async with open_loops(api, tmp_path / LEDGER, range(48), in_flight=200) as harness:

                def commit_and_count(writer: LedgerWriter, batch: list[Any]) -> None:
                    commit(writer, batch)
                    submitting.append(queries.state_counts(harness.ledger.wrapped).get(State.SUBMITTING, 0))

                monkeypatch.setattr(LedgerWriter, "_commit", commit_and_count)
                harness.request_log.awaited_posts_in_flight = MAX_POSTS_IN_FLIGHT
                await harness.run_loops()

        with serve_api(tmp_path / "api.db", latency="fixed(0.05)") as api:
            asyncio.run(scenario(api))
            assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (48, 0)
        assert max(submitting) == MAX_POSTS_IN_FLIGHT

    def test_rate_limit_is_kept(self, api: SandboxApi, tmp_path: Path) -> None:
        """Submits and polls together stay below the job's `requests_per_second`."""

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(15), rate=40.0) as harness:
                started = time.monotonic()
                await harness.run_loops()
                elapsed = time.monotonic() - started
                assert (
                    30
                    <= harness.request_log.posts + len(harness.request_log.polled_task_ids)
                    <= 1 + 40 * (elapsed + MAX_BURST_S)
                )

        asyncio.run(scenario())

    def test_canary_sends_distinct_requests(self, api: SandboxApi, tmp_path: Path) -> None:
        """A canary sends its requests only, refused ones again, unconfirmed ones not; the rest stays pending."""
        api.inject_fault("rate-limit-bare", 3, "post")
        api.inject_fault("error-after", 2, "post")

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(50)) as harness:
                await harness.run_loops(new_up_to=39)
                assert harness.run_state.counters.submitted == 38
                assert harness.run_state.exit_reasons == {}
                counts = queries.state_counts(harness.ledger.wrapped)
                assert (counts[State.IN_DOUBT], counts[State.PENDING]) == (2, 10)

        asyncio.run(scenario())
        assert api.audit()["accepted"] == 40

    def test_ends_with_empty_queue(self, api: SandboxApi, tmp_path: Path) -> None:
        """With an empty queue and no open tasks, the dispatcher ends at once."""

        async def scenario() -> float:
            async with open_loops(api, tmp_path / LEDGER) as harness:
                started = time.monotonic()
                await harness.run_loops()
                return time.monotonic() - started

        assert asyncio.run(scenario()) < 5
        assert api.audit()["accepted"] == 0

    @pytest.mark.long
    def test_cap_waits_for_open_tasks(self, tmp_path: Path) -> None:
        """At the cap the dispatcher waits while open tasks may release credits, and ends when none can."""
        cap = 3 * SANDBOX_MAX_PRICE

        async def scenario(api: SandboxApi) -> int:
            async with open_loops(api, tmp_path / LEDGER, range(50), cap=cap) as harness:
                await harness.run_loops()
                assert harness.request_log.max_open_tasks <= 3
                assert ExitCode.CREDITS in harness.run_state.exit_reasons
                spent, reserved, _, submitted = harness.ledger.execution_counters
                assert reserved == 0
                assert cap - SANDBOX_MAX_PRICE < spent <= cap
                assert submitted > 3
                return spent

        with serve_api(tmp_path / "api.db", latency="fixed(0.02)") as api:
            spent = asyncio.run(scenario(api))
            assert api.audit()["credits_charged"] == pytest.approx(spent / 1e6)

    def test_cap_sufficient_for_all(self, api: SandboxApi, tmp_path: Path) -> None:
        """A cap that is enough for all requests delays some but ends with none left."""

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(6), cap=8 * SANDBOX_MAX_PRICE // 2) as harness:
                await harness.run_loops()
                assert harness.run_state.exit_reasons == {}
                assert harness.run_state.counters.submitted == 6

        asyncio.run(scenario())

    def test_unknown_prices_keep_reservation(self, tmp_path: Path) -> None:
        """An answer without a price keeps its reservation, so the cap holds even for unknown prices."""

        async def scenario(api: SandboxApi) -> None:
            async with open_loops(api, tmp_path / LEDGER, range(9), cap=4 * SANDBOX_MAX_PRICE) as harness:
                await harness.run_loops()
                assert harness.ledger.execution_counters == (0, 4 * SANDBOX_MAX_PRICE, 4, 4)
                assert ExitCode.CREDITS in harness.run_state.exit_reasons

        with serve_api(tmp_path / "api.db", hide_credits=True, hit_rate=0.0) as api:
            asyncio.run(scenario(api))


class TestAnswers:
    """The effect of each response to a POST on its request."""

    @pytest.mark.parametrize("fault", first_quick(1, ["rate-limit-bare", "rate-limit", "redirect"]))
    def test_rejections_are_resent_without_loss(
        self, api: SandboxApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        """A rejected POST is sent again, is paid once, and does not count as an attempt."""
        count = 20 if fault == "rate-limit-bare" else 2
        api.inject_fault(fault, count, "post")
        # On a busy machine the rejections come one by one, each after a longer pause: that is no outage.
        monkeypatch.setattr(rate_limit, "MAX_PAUSE_S", 0.2)
        timing = structs.replace(SHORT_TIMEOUTS, outage_s=300.0)

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(45), timing=timing) as harness:
                await harness.run_loops()
                assert harness.run_state.exit_reasons == {}
                assert harness.run_state.counters.rate_limited == (0 if fault == "redirect" else count)
                assert harness.ledger.query_all("SELECT DISTINCT attempt_count FROM requests") == [(1,)]
                refused = harness.ledger.query_one(
                    "SELECT count(*), sum(credits) FROM attempts WHERE state = 'refused'"
                )
                assert refused == (count, 0)
                assert no_credits_reserved(harness.ledger)

        asyncio.run(scenario())
        assert (api.audit()["accepted"], api.audit()["accepted_more_than_once"]) == (45, 0)

    @pytest.mark.parametrize(
        "fault",
        first_quick(2, ["error-after", "reset-after", "html-200", "broken-json", "no-task-id", "silence-after"]),
    )
    def test_unconfirmed_request_is_not_resent(self, api: SandboxApi, tmp_path: Path, fault: str) -> None:
        """An unconfirmed request is in doubt, keeps its reservation and is not resent; the others go on."""
        api.inject_fault(fault, 2, "post")
        timing = SHORT_POST_TIMEOUT if fault == "silence-after" else SHORT_TIMEOUTS

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(20), timing=timing) as harness:
                await harness.run_loops()
                assert harness.run_state.exit_reasons == {}
                assert queries.state_counts(harness.ledger.wrapped)[State.IN_DOUBT] == 2
                assert harness.ledger.execution_counters[1] == 2 * SANDBOX_MAX_PRICE
                assert harness.request_log.posts == 20

        asyncio.run(scenario())
        assert (api.audit()["accepted"], api.audit()["accepted_more_than_once"]) == (20, 0)

    @pytest.mark.long
    def test_circuit_breaker_opens(self, api: SandboxApi, tmp_path: Path) -> None:
        """After the first failures one POST at a time probes the API; when they fail for too long, the run ends."""
        api.inject_fault("error-before", 1000, "post", status=503)

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(200), timing=SHORT_OUTAGE_TIMEOUT) as harness:
                await harness.run_loops()
                assert ExitCode.API in harness.run_state.exit_reasons
                in_doubt = queries.state_counts(harness.ledger.wrapped)[State.IN_DOUBT]
                assert 0 < in_doubt == harness.request_log.posts <= MAX_POSTS_IN_FLIGHT + 12

        asyncio.run(scenario())

    @pytest.mark.long
    def test_circuit_breaker_closes(self, api: SandboxApi, tmp_path: Path) -> None:
        """One success closes the breaker, and the rest is sent in parallel."""
        api.inject_fault("error-before", 34, "post")

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(100)) as harness:
                await harness.run_loops()
                assert harness.run_state.exit_reasons == {}
                assert queries.state_counts(harness.ledger.wrapped)[State.IN_DOUBT] == 34
                assert harness.run_state.counters.submitted == 66

        asyncio.run(scenario())

    @pytest.mark.long
    def test_endless_429_ends_run(self, api: SandboxApi, tmp_path: Path) -> None:
        """Only 429s for as long as the outage limit end the run, and everything is pending again."""
        api.inject_fault("rate-limit-bare", 100_000, "all")

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(50), timing=SHORT_OUTAGE_TIMEOUT) as harness:
                await harness.run_loops()
                assert ExitCode.API in harness.run_state.exit_reasons
                assert queries.state_counts(harness.ledger.wrapped) == {State.PENDING: 50}

        asyncio.run(scenario())

    @pytest.mark.long
    def test_unreachable_api_leaves_all_pending(self, api: SandboxApi, tmp_path: Path) -> None:
        """Without a connection nothing was sent: all requests are pending and nothing is reserved."""
        nowhere = replace(api, base_url="http://127.0.0.1:9/v1")

        async def scenario() -> None:
            async with open_loops(nowhere, tmp_path / LEDGER, range(50), timing=SHORT_OUTAGE_TIMEOUT) as harness:
                await harness.run_loops()
                assert ExitCode.API in harness.run_state.exit_reasons
                assert queries.state_counts(harness.ledger.wrapped) == {State.PENDING: 50}
                assert no_credits_reserved(harness.ledger)

        asyncio.run(scenario())

    def test_param_error_fails_one_row(self, api: SandboxApi, tmp_path: Path) -> None:
        """A 400 about a param fails that request at no cost; the others are sent."""

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER) as harness:
                rows = [RowRequest(number, fingerprint(number), params(number)) for number in range(5)]
                batch = as_batch([*rows, RowRequest(5, b"w" * 16, '{"first_name": "Ada"}')])
                harness.ledger.commit(enroll.enroll, CALL, batch, DEFAULT_SELECTION)
                harness.ledger.commit(queue.fill_queue, DEFAULT_SELECTION)
                await harness.run_loops()
                counts = queries.state_counts(harness.ledger.wrapped)
                assert (counts[State.FAILED], sum(counts.values())) == (1, 6)
                error, credits_ = harness.ledger.query_one("SELECT error, credits FROM attempts WHERE state = 'failed'")
                assert "last_name" in error
                assert credits_ == 0
                assert no_credits_reserved(harness.ledger)
                assert harness.run_state.counters.settled[State.FAILED] == 1

        asyncio.run(scenario())

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("target", "fault", "code"),
        [
            (Target(TargetKind.WATERFALL, "nothing_getter", (833,)), None, ExitCode.USAGE),
            (Target(TargetKind.WATERFALL, "email_getter", (4711,)), None, ExitCode.USAGE),
            (CALL, "unauthorized", ExitCode.KEY),
            (CALL, "forbidden", ExitCode.KEY),
            (CALL, "no-credits", ExitCode.CREDITS),
        ],
        ids=["404", "400", "401", "403", "406"],
    )
    def test_fatal_error_stops_run(
        self, api: SandboxApi, tmp_path: Path, target: Target, fault: str | None, code: ExitCode
    ) -> None:
        """A fatal error ends the execution with its code; every request is pending again at no cost."""
        if fault:
            api.inject_fault(fault, 1000, "post")

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(80)) as harness:
                await harness.run_loops(target=target)
                assert set(harness.run_state.exit_reasons) == {code}
                assert queries.state_counts(harness.ledger.wrapped) == {State.PENDING: 80}
                assert no_credits_reserved(harness.ledger)
                assert harness.request_log.posts <= MAX_POSTS_IN_FLIGHT

        asyncio.run(scenario())
        assert api.audit()["accepted"] == 0

    @pytest.mark.long
    def test_free_failure_is_resent(self, tmp_path: Path) -> None:
        """Edge g: while tasks are in flight, the dispatcher waits for failures that may be resent."""

        async def scenario(api: SandboxApi) -> None:
            async with open_loops(api, tmp_path / LEDGER, range(10)) as harness:
                await harness.run_loops(harness.make_poller(max_attempts=3))
                counts = queries.state_counts(harness.ledger.wrapped)
                assert set(counts) <= {State.FOUND, State.NOT_FOUND}
                assert 20 <= harness.request_log.posts <= 30

        with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
            asyncio.run(scenario(api))
            assert api.audit()["paid_twice"] == 0


class TestEnding:
    """Stopping in the middle leaves only real unconfirmed requests."""

    def test_stop_sends_no_more_requests(self, tmp_path: Path) -> None:
        """After a stop no POST is sent; POSTs in flight are recorded, and the rest stays pending."""

        async def scenario(api: SandboxApi) -> None:
            async with open_loops(api, tmp_path / LEDGER, range(200)) as harness:
                work = asyncio.create_task(harness.run_loops())
                await wait_until(lambda: harness.request_log.posts_in_flight > 0)
                harness.run_state.stop(ExitCode.INTERRUPTED, EnrichError("stop"))
                sent = harness.request_log.posts
                await work
                assert harness.request_log.posts == sent
                counts = queries.state_counts(harness.ledger.wrapped)
                assert counts.pop(State.PENDING) == 200 - sent
                assert set(counts) <= {State.FOUND, State.NOT_FOUND}

        with serve_api(tmp_path / "api.db", faults=delay_posts(0.2)) as api:
            asyncio.run(scenario(api))

    @pytest.mark.parametrize("leave", [True, False], ids=["leave", "stop"])
    def test_unsent_claims_are_released(self, api: SandboxApi, tmp_path: Path, *, leave: bool) -> None:
        """A run that ends between a claim and its POST releases the claim."""

        async def scenario() -> None:
            async with open_loops(api, tmp_path / LEDGER, range(50)) as harness:
                begun, ended = threading.Event(), threading.Event()

                def busy(_: Database) -> None:
                    begun.set()
                    ended.wait(30)

                harness.writer.submit(busy)
                await wait_until(begun.is_set)
                work = asyncio.create_task(harness.run_loops())
                await wait_until(lambda: harness.writer._batches.qsize() > 0)  # the claims wait behind it
                if leave:
                    harness.run_state.abort_now()
                else:
                    harness.run_state.stop(ExitCode.INTERRUPTED, EnrichError("stop"))
                ended.set()
                await work
                assert await harness.writer.submit(resume.recover, 1) == 0
                assert queries.state_counts(harness.ledger.wrapped) == {State.PENDING: 50}
                assert no_credits_reserved(harness.ledger)
                assert harness.ledger.query_one("SELECT count(*) FROM attempts WHERE state = 'refused'")[0] > 0
                assert harness.request_log.posts == 0

        asyncio.run(scenario())

    def test_abort_marks_only_posts_in_flight_in_doubt(self, tmp_path: Path) -> None:
        """An abort leaves exactly the POSTs in flight in doubt."""

        async def scenario(api: SandboxApi) -> None:
            async with open_loops(api, tmp_path / LEDGER, range(200)) as harness:
                work = asyncio.create_task(harness.run_loops())
                await wait_until(lambda: harness.request_log.posts_in_flight == MAX_POSTS_IN_FLIGHT)
                harness.run_state.abort_now()
                await work
                assert await harness.writer.submit(resume.recover, 1) == MAX_POSTS_IN_FLIGHT
                assert harness.ledger.execution_counters[1] == MAX_POSTS_IN_FLIGHT * SANDBOX_MAX_PRICE

        with serve_api(tmp_path / "api.db", faults=delay_posts(30)) as api:
            asyncio.run(scenario(api))

    @pytest.mark.long
    def test_ledger_error_stops_dispatcher(self, api: SandboxApi, tmp_path: Path) -> None:
        """The first failed commit ends the dispatcher with its own error, and no more POSTs are sent."""

        async def scenario() -> int:
            async with open_loops(api, tmp_path / LEDGER, range(2000)) as harness:
                (pages,) = harness.ledger.query_one("PRAGMA page_count")
                harness.ledger.wrapped.session.execute(f"PRAGMA max_page_count = {pages + 5}")
                with pytest.raises(LedgerFailed, match="full"):
                    await harness.run_loops()
                sent = harness.request_log.posts
                await asyncio.sleep(0.2)
                assert harness.request_log.posts == sent < 2000
                return sent

        sent = asyncio.run(scenario())
        ledger = CommittingLedger.open(tmp_path / LEDGER)
        ledger.commit(resume.recover, 1)
        counts = queries.state_counts(ledger.wrapped)
        ledger.wrapped.close()
        assert counts[State.PENDING] + sent >= 2000

    @pytest.mark.long
    @pytest.mark.parametrize("waiting_for", ["room", "cap", "queue", "rate"])
    def test_waiting_uses_no_cpu(self, tmp_path: Path, waiting_for: str) -> None:
        """The loops sleep while tasks run, whatever they wait for."""
        leads = range(60) if waiting_for != "queue" else range(20)
        knobs = {"room": {"in_flight": 20}, "cap": {"cap": 20 * SANDBOX_MAX_PRICE}, "queue": {}, "rate": {"rate": 10}}

        async def scenario(api: SandboxApi) -> float:
            knob: dict[str, Any] = knobs[waiting_for]
            async with open_loops(api, tmp_path / LEDGER, leads, **knob) as harness:
                work = asyncio.create_task(harness.run_loops())
                used = 1.0
                for _ in range(5):  # on a busy machine submitting may take a moment longer
                    await asyncio.sleep(0.5)
                    before = time.thread_time()
                    await asyncio.sleep(1)
                    used = time.thread_time() - before
                    if used < MAX_IDLE_CPU_S:
                        break
                harness.run_state.abort_now()
                await work
                return used

        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            assert asyncio.run(scenario(api)) < MAX_IDLE_CPU_S


def test_release_survives_lost_commit(api: SandboxApi, tmp_path: Path) -> None:
    """When the commit of a release is lost, the release can be repeated and still has its claims."""

    async def scenario() -> None:
        async with open_loops(api, tmp_path / LEDGER, range(3)) as harness:
            ledger, dispatcher = harness.ledger.wrapped, harness.make_dispatcher(harness.make_poller())
            with ledger.transaction():
                dispatcher._claim_posts(ledger, 3, 1, 0)
            ledger.session.begin()
            transitions.release_unsent(ledger, dispatcher._unsent_attempts, 0)
            ledger.rollback()
            with ledger.transaction():
                transitions.release_unsent(ledger, dispatcher._unsent_attempts, 0)
            assert queries.state_counts(ledger) == {State.PENDING: 3}

    asyncio.run(scenario())


def test_release_after_a_lost_claim(api: SandboxApi, tmp_path: Path) -> None:
    """When the commit of a claim is lost and the repeated claim takes fewer requests, only these are released."""

    async def scenario() -> None:
        async with open_loops(api, tmp_path / LEDGER, range(3)) as harness:
            ledger, dispatcher = harness.ledger.wrapped, harness.make_dispatcher(harness.make_poller())
            ledger.session.begin()
            dispatcher._claim_posts(ledger, 3, 1, 0)
            ledger.rollback()
            with ledger.transaction():
                dispatcher._claim_posts(ledger, 1, 1, 0)
            with ledger.transaction():
                transitions.release_unsent(ledger, dispatcher._unsent_attempts, 0)
            assert queries.state_counts(ledger) == {State.PENDING: 3}

    asyncio.run(scenario())


def test_no_claims_without_valid_lease(api: SandboxApi, tmp_path: Path) -> None:
    """Without a valid lease the dispatcher waits and claims nothing."""

    async def scenario() -> None:
        async with open_loops(api, tmp_path / LEDGER, range(3)) as harness:
            asked = 0

            def holds() -> bool:
                nonlocal asked
                asked += 1
                return asked > 2

            harness.run_state.lease_valid = holds
            await harness.run_loops()
            assert harness.ledger.query_all("SELECT count(*) FROM attempts") == [(3,)]

    asyncio.run(scenario())


def test_nothing_is_sent_after_the_lease_has_ended(api: SandboxApi, tmp_path: Path) -> None:
    """A request that was claimed with a valid lease is not sent without one: another process may have taken it over."""

    async def scenario() -> None:
        async with open_loops(api, tmp_path / LEDGER, range(1)) as harness:
            read_attempts = partial(harness.ledger.query_all, "SELECT state, error FROM attempts ORDER BY id")
            harness.run_state.lease_valid = lambda: read_attempts() != [("submitting", None)]
            await harness.run_loops()
            assert read_attempts()[0] == ("refused", "not sent")
            assert harness.run_state.counters.submitted == 1

    asyncio.run(scenario())
    assert api.audit()["accepted"] == 1
