"""The queue: claims in its order, also beside old snapshots, and the cost of a step, which is seldom added up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.ledger import queue, resume, transitions
from enrich.ledger.database import Database
from enrich.ledger.queue import CLAIMS_PER_FULL_LOOK, StepCapReached
from enrich.models import State
from tests.support.ledger import COST, FOUND, FREE_FAILURE, MAX_PRICE, CommittingLedger, params, run_sql
from tests.support.workspace import both_backends

backend = both_backends

CLAIMED_BESIDE_SNAPSHOT = 3_000
CLAIMS_UNDER_CAP = 400
BULK_TASKS = 40
BULK_SIZE = 100


def claim_leads(ledger: CommittingLedger, count: int) -> list[tuple[int, int]]:
    """Claim requests one by one; return attempt and lead of each."""
    leads = {params(number): number for number in range(1_000)}
    claims = [ledger.claim() for _ in range(count)]
    return [(claim.attempt_id, leads[claim.params]) for claim in claims]


@pytest.mark.parametrize("how", ["refused", "failed at no charge", "rolled back"])
def test_returned_request_is_claimed_next(ledger: CommittingLedger, how: str) -> None:
    """A request that returns to the queue keeps its place in it."""
    ledger.start_and_enroll(*range(6))
    first, second, _ = claim_leads(ledger, 3)
    if how == "refused":
        ledger.commit(transitions.record_refused, [(second[0], "429", ledger.now)])
    elif how == "failed at no charge":
        ledger.commit(transitions.record_accepted, [(second[0], "task", ledger.now)], {})
        ledger.settle(second[0], FREE_FAILURE)
    else:

        def claim_and_fail(wrapped: Database) -> None:
            queue.claim(wrapped, ledger.execution, MAX_PRICE, ledger.now)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            ledger.commit(claim_and_fail)
    expected = [3, 4, 5] if how == "rolled back" else [1, 3, 4, 5]
    assert [lead for _, lead in claim_leads(ledger, len(expected))] == expected
    assert first[1] == 0
    assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []


@pytest.mark.parametrize("left", [10, 2 * CLAIMS_PER_FULL_LOOK])
def test_request_returned_by_other_process_is_not_skipped(ledger: CommittingLedger, left: int) -> None:
    """What another process returns is claimed after a while, and before the queue counts as empty."""
    ledger.start_and_enroll(*range(left + 3))
    (attempt, _), *_ = claim_leads(ledger, 3)
    with closing(Database(ledger.location)) as other, other.transaction():
        transitions.record_refused(other, [(attempt, "429", ledger.now)])
    leads = [lead for _, lead in claim_leads(ledger, left + 1)]

    assert sorted(leads) == [0, *range(3, left + 3)]
    assert [lead for lead in leads if lead] == list(range(3, left + 3))
    assert leads.index(0) <= CLAIMS_PER_FULL_LOOK
    assert ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now) == []


def test_other_selection_begins_at_the_start(ledger: CommittingLedger) -> None:
    """Claims of new requests only, and those of the next pass, do not move where all claims begin."""
    ledger.start_and_enroll(*range(4))
    attempt = ledger.submit()
    ledger.settle(attempt, replace(FREE_FAILURE, free_failure=False))
    ledger.enroll(range(4), retry=[State.FAILED])
    (new,) = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, new_up_to=2)
    assert new.params == params(1)
    assert [lead for _, lead in claim_leads(ledger, 3)] == [0, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["server"], indirect=True)
def test_claims_beside_old_snapshot(ledger: CommittingLedger, ledger_location: LedgerLocation) -> None:
    """While a backup reads an old snapshot, a claim does not go over the entries of all earlier claims."""
    assert isinstance(ledger_location, PostgresLocation)
    ledger.start_and_enroll(*range(CLAIMED_BESIDE_SNAPSHOT + 100))
    with psycopg.connect(ledger_location.conninfo, options=f"-c search_path={ledger_location.schema}") as backup:
        backup.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        backup.execute("SELECT count(*) FROM requests")
        for _ in range(CLAIMED_BESIDE_SNAPSHOT // 50):
            ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, 50)
        assert claim_buffers(ledger) < 40
        backup.rollback()


@pytest.mark.long
@pytest.mark.parametrize("backend", ["server"], indirect=True)
def test_first_run_finds_its_attempts_by_index(ledger: CommittingLedger, ledger_location: LedgerLocation) -> None:
    """Statements that the server has planned when the tables were almost empty do not read them whole later."""
    ledger.start_and_enroll(*range(BULK_TASKS * BULK_SIZE))
    for _ in range(BULK_TASKS):
        ledger.settle_bulk(ledger.submit_bulk(BULK_SIZE), FOUND, credits_=0)
    ledger.wrapped.execute("SELECT pg_stat_force_next_flush()")
    ((of_table, of_open_attempts),) = run_sql(
        ledger_location,
        "SELECT seq_tup_read, idx_tup_read FROM pg_stat_user_tables t JOIN pg_stat_user_indexes i USING (relid) "
        "WHERE t.schemaname = current_schema() AND t.relname = 'attempts' AND indexrelname = 'open_attempts'",
    )
    assert of_table + of_open_attempts < BULK_TASKS * BULK_SIZE


@pytest.mark.long
@pytest.mark.parametrize("backend", ["server"], indirect=True)
def test_task_ids_are_found_by_index(ledger: CommittingLedger, ledger_location: LedgerLocation) -> None:
    """Comparing the id of a bulk task with those of the ledger does not read all attempts."""
    ledger.start_and_enroll(*range(20_002))
    ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, 20_000)
    run_sql(ledger_location, "UPDATE attempts SET task_id = id::text")
    run_sql(ledger_location, "ANALYZE attempts")
    (pages,) = ledger.query_one("SELECT pg_relation_size('attempts') / 8192")
    claims = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, 2, bulk=True)
    for sql in ("SELECT value->>0", "SELECT coalesce(-a.bulk_task_id"):
        with buffers_of(ledger, sql) as buffers:
            transitions.check_task_ids(ledger.wrapped, {claim.attempt_id: "new" for claim in claims})
        assert sum(buffers) < pages / 10


def claim_buffers(ledger: CommittingLedger) -> int:
    """Return how many buffers the next claim's look at the queue touches."""
    with buffers_of(ledger, "SELECT id, queue_position FROM requests") as buffers:
        ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now)
    return sum(buffers)


@contextmanager
def buffers_of(ledger: CommittingLedger, start: str) -> Iterator[list[int]]:
    """Collect how many buffers each statement that begins with `start` touches."""
    buffers: list[int] = []
    db = ledger.wrapped.session
    execute = db.execute

    def explain(sql: str, values: Any = (), /) -> Any:
        if sql.startswith(start):
            plan = execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", values).fetchone()[0][0]["Plan"]
            buffers.append(int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]))
        return execute(sql, values)

    db.execute = explain  # type: ignore[method-assign]
    yield buffers
    db.execute = execute  # type: ignore[method-assign]
    assert buffers


def test_price_above_the_reserved_one_under_a_cap_of_a_step(ledger: CommittingLedger) -> None:
    """What an answer costs beyond its reservation counts at the next claim, and so does a task that came back."""
    ledger.start_and_enroll(*range(8))
    lost = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, step="email")[0].attempt_id
    ledger.commit(transitions.mark_in_doubt, [(lost, "lost", ledger.now, "lost task")])
    ledger.start_and_enroll(*range(8))

    def claim(cap: int) -> int:
        (claim,) = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, step="email", step_cap=cap)
        return claim.attempt_id

    attempt = claim(100)
    ledger.commit(transitions.record_accepted, [(attempt, "task", ledger.now)], {})
    ledger.settle(attempt, replace(FOUND, credits=30))
    with pytest.raises(StepCapReached):
        claim(30 + MAX_PRICE - 1)
    claim(100)
    ledger.commit(resume.revive, [lost], ledger.execution)
    with pytest.raises(StepCapReached):
        claim(30 + 3 * MAX_PRICE - 1)
    claim(30 + 3 * MAX_PRICE)


@pytest.mark.long
def test_cost_is_added_up_a_few_times(ledger: CommittingLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a cap that holds twice what is claimed, each claim reads only what was claimed since the last one."""
    sums = list[int]()
    exact_cost = queue._exact_cost

    def count_sums(*given: Any) -> int:
        sums.append(cost := exact_cost(*given))
        return cost

    monkeypatch.setattr(queue, "_exact_cost", count_sums)
    ledger.start_and_enroll(*range(CLAIMS_UNDER_CAP + 1))
    cap = COST * CLAIMS_UNDER_CAP + MAX_PRICE - 1
    for number in range(CLAIMS_UNDER_CAP):
        (claim,) = ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, step="email", step_cap=cap)
        ledger.commit(transitions.record_accepted, [(claim.attempt_id, f"task{number}", ledger.now)], {})
        ledger.settle(claim.attempt_id, FOUND)
    assert 0 < len(sums) < CLAIMS_UNDER_CAP / 10
    with pytest.raises(StepCapReached):
        ledger.commit(queue.claim, ledger.execution, MAX_PRICE, ledger.now, step="email", step_cap=cap)
