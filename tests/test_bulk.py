"""`dispatch: bulk`: many requests as one task, with the promises of single runs, by the API's own books."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enrich.api.client import BULK_POSTS_ON_THE_WIRE
from enrich.dispatcher import Dispatcher
from enrich.errors import EnrichError, Exit
from enrich.execution import Timing
from enrich.model import State
from enrich.receipt import Receipt
from enrich.sandbox import Fault, questions
from enrich.store.records import check
from enrich.surroundings import Options
from tests.cases import examples, first_quick
from tests.harness import BOTH_IN_TIME, HASTY, IN_A_FILE, SILENT, Api, Office, kill, later, people, serving, until
from tests.loops import at_work
from tests.test_erasure import bytes_of, forget

LEADS, SIZE = 25, 10
#: So many single runs are submitted within a second on any machine.
FEW = 6
#: What one request of the standard job may cost at worst, in credits.
WORST = 3.51


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def office(office: Office) -> Office:
    """Make a job that sends ten requests as one task, with 25 leads."""
    office.write_job(dispatch=f"{{bulk: {SIZE}}}")
    office.write_leads(people(LEADS))
    return office


def statuses(office: Office) -> Counter[str]:
    """Count the rows by status."""
    return Counter(row["enrich_status"] for row in office.output())


def asked(api: Api, name: str) -> int:
    """Count the requests of a kind that the API has seen."""
    return int(api.audit()["requests"].get(name, 0))


def accepted(api: Api) -> dict[str, int]:
    """Tell how many runs of each lead were accepted."""
    return {run["params"]["first_name"]: run["accepted"] for run in api.audit()["runs"]}


def bundles(office: Office) -> list[tuple[Any, ...]]:
    """Look at the bundles as a person does: size, credits, states."""
    return office.sql("SELECT size, credits, states FROM readable_bundles ORDER BY id")


def told_the_truth(api: Api, office: Office, receipt: Receipt) -> None:
    """Nothing twice, nothing lost, the receipt is the vendor's bill, and the ledger agrees with itself."""
    audit = api.audit()
    assert audit["paid_twice"] == 0
    assert receipt.credits_spent == pytest.approx(audit["credits_charged"])
    assert check(office.place).problems == []


# One task for many


def test_many_requests_are_one_task(api: Api, office: Office) -> None:
    """Three POSTs for 25 leads; each row has its answer, its task, and no price of its own."""
    receipt = office.run(api)

    assert (receipt.exit_code, receipt.submitted, receipt.credits_unknown) == (0, LEADS, 0)
    assert (asked(api, "bulk_run"), asked(api, "run"), asked(api, "task")) == (3, 0, receipt.polls)
    output = office.output()
    assert len({row["enrich_task_id"] for row in output}) == 3
    assert {row["enrich_credits"] for row in output} == {""}
    assert {row["enrich_status"] for row in output} == {"found", "not_found"}
    told_the_truth(api, office, receipt)


def test_the_price_of_a_task_is_in_the_ledger(api: Api, office: Office) -> None:
    """Once, beside its bundle: status, runs, plan and a person with `sqlite3` see the same sum."""
    receipt = office.run(api)

    sizes = [size for size, _, _ in bundles(office)]
    assert sizes == [10, 10, 5]
    assert sum(float(credits_) for _, credits_, _ in bundles(office)) == pytest.approx(receipt.credits_spent)
    status = office.command("status", "job.yaml", "--json").receipt
    assert (status["credits_spent"], status["credits_unknown"]) == (receipt.credits_spent, 0)
    runs = office.command("runs", "job.yaml", "--json").receipt
    assert runs["totals"]["credits_spent"] == receipt.credits_spent
    office.write_leads(people(2 * LEADS))
    plan = office.command("plan", "job.yaml", "--json", api=api).receipt
    assert plan["cost"]["likely"] == pytest.approx(receipt.credits_spent, abs=1e-4)


def test_a_plan_counts_tasks_for_its_time(api: Api, office: Office) -> None:
    """Ten requests in a POST take a tenth of the time."""
    office.write_job(limits="{requests_per_second: 1}", dispatch="{bulk: 25}")
    assert office.command("plan", "job.yaml", "--json", api=api).receipt["seconds"] == 2.5
    assert (
        "polls a task of 25"
        in office.command("plan", "job.yaml", api=api).stderr + office.command("plan", "job.yaml", api=api).stdout
    )


def test_a_second_run_asks_nothing(api: Api, office: Office) -> None:
    """Answers are reused, and more leads are a new task."""
    office.run(api)
    office.write_leads(people(LEADS + 3))

    receipt = office.run(api)

    assert (receipt.submitted, receipt.reused, asked(api, "bulk_run")) == (3, LEADS, 4)
    assert set(accepted(api).values()) == {1}


@pytest.mark.long
@settings(max_examples=examples(4), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(1, 1000),
    size=st.integers(2, 20),
    shape=st.sampled_from(["wrapped", "wrapper_object", "flat", "flat_list"]),
    hit_rate=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_output_is_that_of_single_runs(seed: int, size: int, shape: Any, hit_rate: float) -> None:
    """But for credits, task ids and times."""
    outputs = []
    for bulk in (None, size):
        with tempfile.TemporaryDirectory() as folder:
            office = Office(Path(folder))
            office.write_job(**({"dispatch": f"{{bulk: {bulk}}}"} if bulk else {}))
            office.write_leads(people(12))
            with serving(office.folder / "api.db", seed=seed, shape=shape, hit_rate=hit_rate) as api:
                assert office.run(api).exit_code == Exit.OK
            differ = {"enrich_credits", "enrich_task_id", "enrich_at"}
            outputs.append([{k: v for k, v in row.items() if k not in differ} for row in office.output()])
    assert outputs[0] == outputs[1]


# POSTs that go wrong


@pytest.mark.parametrize(
    "fault",
    first_quick(
        2, ["reset-after", "reset-before", "silence-after", "error-after", "error-before", "no-task-id", "html-200"]
    ),
)
def test_a_lost_post_leaves_its_rows_in_doubt_and_no_others(api: Api, office: Office, fault: str) -> None:
    """They are never sent again by themselves; a person's word buys them as a task again."""
    api.fault(fault, 1, "post")
    night = office.run(api, timing=SILENT if fault == "silence-after" else HASTY)
    assert (night.exit_code, night.in_doubt, night.submitted) == (Exit.IN_DOUBT, SIZE, LEADS - SIZE)
    before = accepted(api)

    again = office.run(api, timing=HASTY)
    assert (again.exit_code, again.submitted, accepted(api)) == (Exit.IN_DOUBT, 0, before)
    assert check(office.place).problems == []

    by_word = office.command("run", "job.yaml", "--json", "--retry", "in_doubt", api=api)
    assert (by_word.code, by_word.receipt["submitted"]) == (0, SIZE)


@pytest.mark.parametrize("fault", ["rate-limit-bare", "redirect"])
def test_what_was_not_accepted_is_sent_again(api: Api, office: Office, fault: str) -> None:
    """All of its rows, once."""
    api.fault(fault, 2, "post")
    receipt = office.run(api, timing=HASTY)
    assert (receipt.exit_code, receipt.submitted, api.audit()["accepted"]) == (0, LEADS, LEADS)
    told_the_truth(api, office, receipt)


@pytest.mark.parametrize(("fault", "code"), [("unauthorized", Exit.KEY), ("no-credits", Exit.CREDITS)])
def test_what_stops_the_run_leaves_the_rest_pending(api: Api, office: Office, fault: str, code: Exit) -> None:
    """401 and 406 mean what they mean for single runs."""
    api.fault(fault, 99, "post")
    receipt = office.run(api, timing=HASTY)
    assert (receipt.exit_code, receipt.pending, receipt.in_doubt) == (code, LEADS, 0)
    api.heal()
    assert office.run(api).exit_code == Exit.OK
    assert api.audit()["accepted"] == LEADS


def test_the_last_credits_buy_what_they_can(tmp_path: Path, office: Office) -> None:
    """Where a whole task is too dear (406), smaller ones are sent; no night buys nothing, or anything twice."""
    with serving(tmp_path / "api.db", balance=8 * WORST, hit_rate=1.0) as api:
        nights = [office.run(api)]
        while nights[-1].exit_code == Exit.CREDITS:
            assert nights[-1].submitted > 0
            nights.append(office.run(api))
        assert asked(api, "406") > 0
        assert accepted(api) == dict.fromkeys(names(range(LEADS)), 1)
    assert nights[-1].exit_code == Exit.OK


def test_near_the_end_of_the_credits_tasks_stay_small(tmp_path: Path, office: Office) -> None:
    """A task that was too dear teaches for the whole run: POSTs that buy nothing use the allowance, too."""
    office.write_job(dispatch="{bulk: 64}")
    office.write_leads(people(400))
    with serving(tmp_path / "api.db", balance=30 * WORST, hit_rate=1.0) as api:
        receipt = office.run(api)
        assert receipt.exit_code == Exit.CREDITS
        # Six times halved, and some on the wire each time; were nothing learned, it would be hundreds.
        assert asked(api, "406") <= 6 * 8


def test_an_api_that_takes_fewer_rows_says_so(tmp_path: Path, office: Office) -> None:
    """Too many at once is a mistake of the job file: nothing is bought, and the API's words are told."""
    office.write_leads(people(2 * SIZE))
    with serving(tmp_path / "api.db", bulk_limit=5) as api:
        done = office.command("run", "job.yaml", "--json", api=api)
        assert (done.code, done.receipt["submitted"], api.audit()["accepted"]) == (Exit.USAGE, 0, 0)
        assert "At most 5 rows" in done.stderr
        office.write_job(dispatch="{bulk: 5}")
        assert office.run(api).exit_code == Exit.OK


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Let the API refuse the leads of this set, which our own check takes for good."""
    refused: set[str] = set()
    judge = questions._mistakes

    def mistakes(waterfall: Any, params: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"company": ["Bad."]} if params["first_name"] in refused else judge(waterfall, params)

    monkeypatch.setattr(questions, "_mistakes", mistakes)
    return refused


def names(numbers: Iterable[int]) -> set[str]:
    """Name leads."""
    return {f"First{number}" for number in numbers}


@pytest.mark.parametrize("shape", first_quick(1, ["new", "fields", "old", "old_short"]))
@pytest.mark.parametrize("numbers", [(3,), (0, 9, 10, 24), tuple(range(8, 15))])
def test_wrong_rows_fail_and_the_others_are_sent_again(
    tmp_path: Path, office: Office, wrong: set[str], shape: Any, numbers: tuple[int, ...]
) -> None:
    """In each generation of the API's body, also when it does not say which rows it means."""
    wrong |= names(numbers)
    with serving(tmp_path / "api.db", error_shape=shape) as api:
        receipt = office.run(api)
        told_the_truth(api, office, receipt)
        assert accepted(api) == dict.fromkeys(names(range(LEADS)) - wrong, 1)

    assert (receipt.exit_code, receipt.failed) == (Exit.SOME_FAILED, len(wrong))
    failed = {row["First Name"]: row["enrich_error"] for row in office.output() if row["enrich_status"] == "failed"}
    assert failed == dict.fromkeys(wrong, "company: Bad.")


@pytest.mark.parametrize("shape", ["new", "old_short"])
def test_rows_that_are_all_wrong_come_to_an_end(tmp_path: Path, office: Office, wrong: set[str], shape: Any) -> None:
    """Every row is failed, and nothing was bought."""
    wrong |= names(range(LEADS))
    with serving(tmp_path / "api.db", error_shape=shape) as api:
        receipt = office.run(api)
        assert (receipt.exit_code, receipt.failed, api.audit()["accepted"]) == (Exit.SOME_FAILED, LEADS, 0)
    assert check(office.place).problems == []


# Answers


def test_an_answer_that_cannot_be_aligned_fails_its_rows(tmp_path: Path, office: Office) -> None:
    """Hits alone, in no order, as the API once did: nobody gets another's address, and the price is told."""
    with serving(tmp_path / "api.db", bulk_data="hits", hit_rate=0.5) as api:
        receipt = office.run(api)
        told_the_truth(api, office, receipt)

    assert (receipt.exit_code, receipt.failed, receipt.credits_unknown) == (Exit.SOME_FAILED, LEADS, 0)
    assert receipt.credits_spent > 0
    assert all("nobody can tell which is whose" in row["enrich_error"] for row in office.output())
    assert not any(row["work_email"] for row in office.output())


def test_what_an_unaligned_task_said_is_told_as_nobodys(tmp_path: Path, office: Office) -> None:
    """`explain` does not show the first address of the task as the first row's."""
    with serving(tmp_path / "api.db", bulk_data="hits", hit_rate=0.5) as api:
        office.run(api)
    told = office.command("explain", "job.yaml", "--row", "1", "--json").receipt
    (attempt,) = told["rows"][0]["request"]["attempts"]
    assert (attempt["answer"], attempt["credits"], attempt["together"]) == (None, None, SIZE)
    assert attempt["task_credits"] > 0
    line = office.command("explain", "job.yaml", "--row", "1").stdout
    assert "with 9 others" in line
    assert "credits for all 10 of the task" in line


def test_hits_alone_that_are_none_are_misses(tmp_path: Path, office: Office) -> None:
    """An empty list is aligned with anything."""
    with serving(tmp_path / "api.db", bulk_data="hits", hit_rate=0.0) as api:
        receipt = office.run(api)
    assert (receipt.exit_code, receipt.not_found) == (0, LEADS)


def test_a_task_that_failed_in_part(tmp_path: Path, office: Office) -> None:
    """What was found is found; a row without an answer is failed where some failed, and says so."""
    with serving(tmp_path / "api.db", failure_rate=0.3, free_failures=0.0, hit_rate=0.6) as api:
        receipt = office.run(api)
        told_the_truth(api, office, receipt)

    assert receipt.exit_code == Exit.SOME_FAILED
    assert receipt.found
    assert any("failed or not found" in row["enrich_error"] for row in office.output())


@pytest.mark.parametrize("attempts", [1, 5])
def test_a_task_that_failed_at_no_charge_is_asked_again(tmp_path: Path, office: Office, attempts: int) -> None:
    """All of its rows, up to `max_attempts`; rows that fail in a task that cost something are not."""
    office.write_job(dispatch=f"{{bulk: {SIZE}}}", policy=f"{{max_attempts: {attempts}}}")
    with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0, hit_rate=1.0) as api:
        receipt = office.run(api)
        told_the_truth(api, office, receipt)
    assert set(tasks_of_each(office)) == {min(attempts, 2)}
    assert bool(receipt.found) is (attempts > 1)
    assert receipt.failed == LEADS - (receipt.found or 0) > 0


def tasks_of_each(office: Office) -> list[int]:
    """Count the tasks of each request."""
    return [count for (count,) in office.sql("SELECT count(task_id) FROM attempts GROUP BY request_id")]


def test_a_price_that_is_not_told_is_not_known(tmp_path: Path, office: Office) -> None:
    """Every row of the task counts as of unknown price and keeps its reservation."""
    with serving(tmp_path / "api.db", hide_credits=True) as api:
        receipt = office.run(api)
        told = office.command("reconcile", "job.yaml", "--json", api=api).receipt

    assert (receipt.credits_spent, receipt.credits_unknown) == (0, LEADS)
    assert (told["unknown_price"]["number"], told["unexplained"]) == (LEADS, 0)
    assert check(office.place).problems == []


def test_a_known_price_explains_the_balance(api: Api, office: Office) -> None:
    """`reconcile` counts each task's credits once."""
    api.fault("error-after", 1, "post")
    receipt = office.run(api, timing=HASTY)
    told = office.command("reconcile", "job.yaml", "--json", api=api).receipt

    assert told["spent"]["number"] == LEADS - SIZE
    assert told["spent"]["most"] == pytest.approx(receipt.credits_spent)
    assert (told["in_doubt"]["number"], told["unexplained"]) == (SIZE, 0)


@pytest.mark.parametrize("how", first_quick(1, ["410", "gone"]))
def test_what_is_gone_is_expired(tmp_path: Path, office: Office, how: Any) -> None:
    """Every row of the task, at an unknown price, whatever the body says."""
    with serving(tmp_path / "api.db", latency="fixed(600)", expired_as=how) as api:
        office.leave_at_the_api(api)
        status = office.command("status", "job.yaml")
        assert "25  requests at the API" in status.stdout
        crontab = [f"--env={name}={value}" for name, value in office.environ.items()]
        assert "25 paid requests wait" in office.command("doctor", "job.yaml", *crontab, api=api).stdout
        api.advance(200_000)
        receipt = office.run(api)
        assert api.audit()["accepted"] == LEADS

    assert (receipt.exit_code, receipt.expired, receipt.credits_unknown) == (Exit.SOME_FAILED, LEADS, LEADS)
    assert check(office.place).problems == []


@pytest.mark.parametrize(
    ("fault", "code", "in_doubt"),
    first_quick(1, [("lost-task=1", 14, SIZE), ("late-task=1,seconds=0.2", 0, 0), ("odd-status=1", 0, 0)]),
)
def test_a_task_that_is_odd(tmp_path: Path, office: Office, fault: str, code: int, in_doubt: int) -> None:
    """Never known since: in doubt; known late, or with a status never seen: waited for."""
    with serving(tmp_path / "api.db") as api:
        parsed = Fault.parse(fault)
        api.fault(parsed.name, 1, "post", **parsed.params)
        receipt = office.run(api, timing=HASTY)
    assert (receipt.exit_code, receipt.in_doubt) == (code, in_doubt)
    assert check(office.place).problems == []


@pytest.mark.long
def test_a_task_that_the_api_forgot(tmp_path: Path, office: Office) -> None:
    """Once known and now 404: its rows are expired, at an unknown price, and not bought again by themselves."""
    with serving(tmp_path / "api.db", latency="fixed(600)") as api:
        office.leave_at_the_api(api)
    # Old enough to be known by now.
    assert office.sql("SELECT count(*) FROM attempts WHERE seen_alive = 1") == [(LEADS,)]
    office.sql("UPDATE attempts SET submitted_ms = submitted_ms - 600000")
    with serving(tmp_path / "other.db", port=int(api.base_url.rpartition(":")[2].partition("/")[0])) as other:
        receipt = office.run(other, timing=replace(Timing(), young_s=0.5))
        assert other.audit()["accepted"] == 0
    assert (receipt.exit_code, receipt.expired, receipt.credits_unknown) == (Exit.SOME_FAILED, LEADS, LEADS)
    assert check(office.place).problems == []


@pytest.mark.long
def test_a_task_that_somebody_cancelled(tmp_path: Path, office: Office) -> None:
    """It failed; at no charge, so it is asked again, and paid for once."""
    with serving(tmp_path / "api.db", latency="fixed(600)") as api:
        office.leave_at_the_api(api)
        ((task_id,),) = office.sql("SELECT task_id FROM attempts WHERE place = 0 LIMIT 1")
        url = f"{api.base_url}/tasks/{task_id}/cancel"
        httpx.post(url, headers={"x-apikey": api.api_key}, trust_env=False).raise_for_status()
        api.advance(1_000)
        receipt = office.run(api, Options(max_time_s=2.0))
        assert (receipt.exit_code, receipt.submitted, statuses(office)["pending"]) == (Exit.TIME, SIZE, SIZE)
        api.advance(1_000)
        assert office.run(api).exit_code == Exit.OK
        assert api.audit()["paid_twice"] == 0


# What limits a run


def test_a_cap_makes_a_task_smaller(tmp_path: Path, office: Office) -> None:
    """No more is reserved than the cap has room for; what came cheaper makes room again."""
    office.write_job(limits=f"{{max_credits: {7 * WORST + 1}}}", dispatch=f"{{bulk: {SIZE}}}")
    office.write_leads(people(200))
    with serving(tmp_path / "api.db", hit_rate=1.0) as api:
        receipt = office.run(api)
        told_the_truth(api, office, receipt)

    assert bundles(office)[0][0] == 7
    assert max(size for size, _, _ in bundles(office)) == 7
    assert receipt.exit_code == Exit.CREDITS
    assert 6 * WORST < receipt.credits_spent <= 7 * WORST + 1


def test_a_limit_holds_exactly(api: Api, office: Office) -> None:
    """`--limit` counts requests, not tasks."""
    receipt = office.run(api, Options(limit=13))
    assert (receipt.submitted, receipt.pending, asked(api, "bulk_run")) == (13, LEADS - 13, 2)


@pytest.mark.parametrize(("hit_rate", "code", "bought"), [(1.0, 0, LEADS), (0.0, 15, 4)])
def test_a_canary_is_a_task_of_its_own(tmp_path: Path, office: Office, hit_rate: float, code: int, bought: int) -> None:
    """Its rows are judged before the others are sent."""
    office.write_job(canary="{rows: 4, min_hit_rate: 0.5}", dispatch=f"{{bulk: {SIZE}}}")
    with serving(tmp_path / "api.db", hit_rate=hit_rate) as api:
        receipt = office.run(api)
        assert (receipt.exit_code, api.audit()["accepted"], bundles(office)[0][0]) == (code, bought, 4)


@pytest.mark.long
def test_few_tasks_are_on_the_wire(tmp_path: Path, office: Office) -> None:
    """All requests of a POST are in doubt when it is lost, so at most four leave at once."""
    office.write_job(dispatch="{bulk: 2}")
    office.write_leads(people(60))
    with serving(tmp_path / "api.db", faults=(Fault("slow", 1.0, "post", {"seconds": 0.4}),)) as api:
        process = office.start("run", "job.yaml", api=api)
        try:
            until(lambda: asked(api, "bulk_run") >= 1)
            seen = max(on_the_wire(office) for _ in range(100))
        finally:
            kill(process)
    assert 2 <= seen <= 2 * BULK_POSTS_ON_THE_WIRE


def on_the_wire(office: Office) -> int:
    """Count the requests whose POST was not answered yet."""
    ((count,),) = office.sql("SELECT count(*) FROM attempts WHERE state = 'submitting'")
    return int(count)


def test_what_was_claimed_and_not_sent_waits_again(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the execution closes between the claim and the POST, nothing is in doubt and nothing set aside."""
    claim = Dispatcher._claim

    async def claim_and_close(dispatcher: Dispatcher, room: int) -> Any:
        claims = await claim(dispatcher, room)
        dispatcher.execution.stop(Exit.API, EnrichError("enough"))
        return claims

    monkeypatch.setattr(Dispatcher, "_claim", claim_and_close)

    async def scene() -> None:
        async with at_work(api, tmp_path / "ledger.db", range(LEADS)) as floor:
            await floor.work(bulk=SIZE)
            assert floor.books.ledger.counts() == {State.PENDING: LEADS}
            assert floor.books.money == (0, 0, 0, 0)
            assert [size for (size,) in floor.books.all("SELECT size FROM bundles")] == [10, 10, 5]
        assert check(tmp_path / "ledger.db").problems == []

    asyncio.run(scene())
    assert api.audit()["accepted"] == 0


@IN_A_FILE  # a server has its own time
def test_old_answers_are_asked_again(api: Api, office: Office) -> None:
    """`policy.refresh` and `--retry` work on bundles, too, and a refused refresh leaves the old answer."""
    office.run(api)
    misses = statuses(office)["not_found"]
    office.write_job(dispatch=f"{{bulk: {SIZE}}}", policy="{refresh: {not_found: 1d}}")
    api.advance(3 * 86_400)
    api.fault("rate-limit-bare", 1, "post")

    receipt = office.run(api, clock=later(3 * 86_400))

    assert (receipt.exit_code, receipt.submitted) == (0, misses)
    assert check(office.place).problems == []


# Interrupted, and continued otherwise


@pytest.mark.parametrize("fault", first_quick(1, ["silence-after", "silence-before"]))
def test_killed_with_tasks_on_the_wire(api: Api, office: Office, fault: str) -> None:
    """What had left is in doubt, at most four POSTs of it; everything else is bought once."""
    office.write_leads(people(100))
    api.fault(fault, BULK_POSTS_ON_THE_WIRE)
    process = office.start("run", "job.yaml", api=api)
    try:
        until(lambda: api.audit()["faults"].get(fault, 0) == BULK_POSTS_ON_THE_WIRE)
    finally:
        kill(process)
    api.heal()

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.in_doubt) == (Exit.IN_DOUBT, BULK_POSTS_ON_THE_WIRE * SIZE)
    assert receipt.submitted == 100 - BULK_POSTS_ON_THE_WIRE * SIZE
    assert (api.audit()["accepted_more_than_once"], api.audit()["paid_twice"]) == (0, 0)
    assert check(office.place).problems == []


@pytest.mark.long
def test_killed_while_tasks_run(tmp_path: Path, office: Office) -> None:
    """The next run collects the bundles first, and buys nothing again."""
    with serving(tmp_path / "api.db", latency="fixed(2)") as api:
        process = office.start("run", "job.yaml", api=api)
        try:
            until(lambda: asked(api, "bulk_run") == 3 and on_the_wire(office) == 0)
        finally:
            kill(process)
        receipt = office.run(api)
        assert (receipt.exit_code, receipt.submitted, api.audit()["accepted"]) == (0, 0, LEADS)
        told_the_truth(api, office, receipt)


@pytest.mark.parametrize("first", first_quick(1, ["bulk", "single"]))
def test_a_job_that_changes_its_mind(tmp_path: Path, office: Office, first: str) -> None:
    """Tasks in flight are collected as what they are, however the job sends now."""
    jobs: dict[str, dict[str, str]] = {"bulk": {"dispatch": f"{{bulk: {SIZE}}}"}, "single": {}}
    second = "single" if first == "bulk" else "bulk"
    with serving(tmp_path / "api.db", latency="fixed(30)") as api:
        office.write_job(**jobs[first])
        office.write_leads(people(FEW))
        office.leave_at_the_api(api)
        office.write_job(**jobs[second])
        office.write_leads(people(FEW + 7))
        later = office.run(api, Options(max_time_s=3.0))
        assert (later.exit_code, later.submitted) == (Exit.TIME, 7)
        api.advance(60)
        office.write_job(**jobs[first])
        receipt = office.run(api)
        told_the_truth(api, office, receipt)
        assert (receipt.exit_code, receipt.submitted, api.audit()["accepted"]) == (0, 0, FEW + 7)


def test_a_bundle_is_judged_by_the_columns_of_its_job(tmp_path: Path, office: Office) -> None:
    """Whichever job of the same ledger collects it."""
    office.write_job(ledger="shared.db", dispatch=f"{{bulk: {SIZE}}}")
    with serving(tmp_path / "api.db", latency="fixed(30)", hit_rate=1.0) as api:
        office.leave_at_the_api(api)
        api.advance(60)
        office.write_job(ledger="shared.db", columns="{other: no_such_field}", name="other")
        assert office.run(api).not_found == LEADS
        office.write_job(ledger="shared.db", dispatch=f"{{bulk: {SIZE}}}")
        receipt = office.run(api)
    assert (receipt.exit_code, receipt.found, receipt.submitted) == (0, LEADS, 0)


def test_nights_of_faults_add_up_to_the_bill(tmp_path: Path, office: Office) -> None:
    """Receipts, and what the doubts cost, are the vendor's bill; every run is sold once."""
    faults = tuple(
        map(Fault.parse, ["reset-after=0.15", "post:error-before=0.1", "post:rate-limit-bare=0.2", "broken-json=0.1"])
    )
    spent = 0.0
    with serving(tmp_path / "api.db", faults=faults, failure_rate=0.1, fault_seed=4) as api:
        for night in range(1, 4):
            office.write_leads(people(40 * night))
            spent += office.run(api, timing=HASTY).credits_spent
            assert check(office.place).problems == []
        audit = api.audit()
    known = {task_id for (task_id,) in office.sql("SELECT task_id FROM attempts")}
    doubts = sum(run["credits"] for run in audit["runs"] if not known.issuperset(run["task_ids"]))
    assert audit["faults"]["reset-after"] > 0
    assert audit["paid_twice"] == 0
    assert spent + doubts == pytest.approx(audit["credits_charged"])


# People


def test_forgetting_one_of_a_task_erases_what_was_said_of_all(tmp_path: Path, office: Office) -> None:
    """The answer of a task whose rows can't be told apart names them all."""
    office.write_leads(people(SIZE))
    with serving(tmp_path / "api.db", bulk_data="hits", hit_rate=0.8, shape="flat") as api:
        office.run(api)
    raw, *_ = (raw for (raw,) in office.sql("SELECT answer FROM attempts WHERE answer IS NOT NULL"))
    emails = [row["email"] for row in json.loads(raw)["bundle"]["data"]]
    assert emails
    assert all(email.encode() in bytes_of(office) for email in emails)

    assert forget(office, "First Name=First7") == 1

    assert not any(email.encode() in bytes_of(office) for email in emails)
    assert check(office.place).problems == []


def test_forgetting_one_leaves_the_answers_of_the_others(api: Api, office: Office) -> None:
    """Where each row has its own answer, hers alone is erased."""
    office.run(api)
    before = {row["First Name"]: row["work_email"] for row in office.output()}
    name = next(name for name, email in before.items() if email)

    assert forget(office, f"First Name={name}") == 1

    office.command("collect", "job.yaml")
    after = {row["First Name"]: row["work_email"] for row in office.output()}
    assert after == before | {name: ""}
    assert check(office.place).problems == []


def test_what_is_old_is_purged_with_its_task(tmp_path: Path, office: Office) -> None:
    """Also when the first of the task was asked again since."""
    with serving(tmp_path / "api.db", bulk_data="hits", hit_rate=0.8, shape="flat") as api:
        office.run(api)
        office.sql("UPDATE attempts SET settled_ms = settled_ms - 864000000")
        office.sql("UPDATE bundles SET settled_ms = settled_ms - 864000000")
        office.run(api, Options(retry=frozenset({State.FAILED}), limit=1))
    done = office.command("purge", "job.yaml", "--older-than", "5d", "--yes", "--json")

    assert done.code == 0, done.stderr
    left = office.sql("SELECT b.size FROM attempts a JOIN bundles b ON b.id = a.bundle_id WHERE a.answer IS NOT NULL")
    assert left == [(1,)]
