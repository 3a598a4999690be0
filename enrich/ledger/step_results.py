"""The requests of a step in the ledger, by fingerprint: their results, the rows recorded with them, their plan.

A row of a job with steps has a request in each of them. What it sends depends on the answers of the steps before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from msgspec import Struct

from enrich.json_text import to_json_text
from enrich.ledger.database import Database
from enrich.ledger.decisions import ANSWERED, FINGERPRINT, as_list, decision_sql, judge_answers
from enrich.ledger.dialect import JSON_NUMBERS, RESULT_PRICE
from enrich.models import Decision, RequestResult, RequestSelection, State


class StepResult(NamedTuple):
    """A request in the ledger. `state` is current. `result` keeps the last match until a newer one comes.

    `was_sent`: it has an answer, or waits for one. Attempts that were refused or failed at no charge do not count.
    """

    request_id: int
    state: State
    was_sent: bool
    result: RequestResult


def find_results(db: Database, fingerprints: Sequence[bytes]) -> dict[bytes, StepResult]:
    """Return the requests with these fingerprints that the ledger has. `position` and `first` depend on their rows."""
    rows = db.execute(
        "SELECT r.fingerprint, r.id, r.state, r.state <> 'pending' OR r.answer_id IS NOT NULL, "
        "CASE WHEN r.answer_id IS NULL THEN r.state ELSE a.state END, a.answer, a.error, a.provider, "
        f"{RESULT_PRICE}, a.task_id, a.settled_ms, a.id, a.erased_ms "
        f"FROM ({_NAMES}) b CROSS JOIN requests r "
        "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) WHERE r.fingerprint = b.fingerprint",
        as_list(list(dict.fromkeys(fingerprints))),
    )
    found = {}
    for fingerprint, request_id, state, was_sent, *of_attempt, erased_ms in rows:
        # In the order of the fields; no request of a step is capped here.
        result = RequestResult._make((0, 1, *of_attempt, 0, erased_ms))
        found[bytes(fingerprint)] = StepResult(request_id, State(state), bool(was_sent), result)
    return found


class StepChoice(NamedTuple):
    """What a run does with a request. `sent_before`: it has an answer from before the run, or before its saved plan."""

    decision: Decision
    sent_before: bool


def choose_requests(
    db: Database, fingerprints: Iterable[bytes], selection: RequestSelection, paths: Iterable[str]
) -> dict[bytes, StepChoice]:
    """Return what a run does with those of the requests that the ledger has. All others are new.

    `paths` are the columns of the step.
    """
    names = list(dict.fromkeys(fingerprints))
    first_attempt = (
        "(SELECT a.previous_state FROM attempts a WHERE a.request_id = r.id AND a.execution_id > CAST(?3 AS BIGINT) "
        "ORDER BY a.id LIMIT 1)"
    )
    rows = db.execute(
        f"SELECT r.id, r.fingerprint, {decision_sql(selection)}, "
        f"r.state <> 'pending' AND coalesce({first_attempt}, r.state) <> 'pending' "
        f"FROM ({_NAMES}) b CROSS JOIN requests r WHERE r.fingerprint = b.fingerprint",
        (*as_list(names), selection.after_execution),
    ).fetchall()
    answered = [number for number, _, decision, _ in rows if decision in ANSWERED]
    judged = judge_answers(db, answered, selection, paths)
    decisions = {number: answer.decision(selection) for number, answer in judged.items()}
    return {
        bytes(name): StepChoice(decisions.get(number, Decision(decision)), bool(before))
        for number, name, decision, before in rows
    }


class StepTotals(Struct, frozen=True):
    """What a run did in a step. `spent` in millionths of a credit; `unknown` counts answers without a price."""

    submitted: int = 0
    spent: int = 0
    unknown: int = 0
    found: int = 0


def step_totals(db: Database, execution_id: int) -> dict[str, StepTotals]:
    """Return what a run sent and settled, by step."""
    rows = db.execute(
        "SELECT step, count(submitted_ms) FILTER (WHERE execution_id = ?1), "
        "coalesce(sum(paid) FILTER (WHERE settled_execution_id = ?1), 0), "
        "count(*) FILTER (WHERE settled_execution_id = ?1 AND paid IS NULL), "
        "count(*) FILTER (WHERE settled_execution_id = ?1 AND state = 'found') "
        "FROM billed WHERE step IS NOT NULL AND (execution_id = ?1 OR settled_execution_id = ?1) GROUP BY step",
        (execution_id,),
    )
    return {step: StepTotals(*map(int, numbers)) for step, *numbers in rows}


def requests_by_step(db: Database) -> dict[str, dict[State, int]]:
    """Count requests by state for each step. A request counts for the step that sent it last."""
    rows = db.execute(
        "SELECT a.step, r.state, count(*) FROM attempts a JOIN requests r ON r.attempt_id = a.id "
        "WHERE a.step IS NOT NULL GROUP BY 1, 2"
    )
    counts: dict[str, dict[State, int]] = {}
    for step, state, number in rows:
        counts.setdefault(step, {})[State(state)] = number
    return counts


def credits_by_step(db: Database) -> dict[str, int]:
    """Return what each step has cost in all runs, in millionths."""
    rows = db.execute("SELECT step, coalesce(sum(paid), 0) FROM billed WHERE step IS NOT NULL GROUP BY 1")
    return {step: int(paid) for step, paid in rows}


def last_target(db: Database, job: str, step: str) -> str | None:
    """Return the target that a step last sent requests to, in canonical form. None: it has sent none."""
    row = db.execute(
        "SELECT c.canonical FROM attempts a JOIN requests r ON r.id = a.request_id JOIN calls c ON c.id = r.call_id "
        "WHERE a.id = (SELECT max(n.id) FROM attempts n JOIN executions e ON e.id = n.execution_id "
        "WHERE n.step = ? AND e.job = ?)",
        (step, job),
    ).fetchone()
    return None if row is None else str(row[0])


class RecordedRow(NamedTuple):
    """A row that is recorded with a request of a step.

    `is_sent_by_step`: the step has sent the request, not another step or job. `is_requested_by_other`: the step
    requests it now, for a row with the same cells.
    """

    is_sent_by_step: bool
    is_requested_by_other: bool


def has_recorded_rows(db: Database) -> bool:
    """Return whether any row is recorded with a request."""
    return db.exists("FROM step_rows")


def begin_requesting_rows(db: Database, step: str) -> None:
    """Start to collect the rows that need a request in a step. None of them does yet."""
    with db.temporary_transaction():
        _ensure_requesting_rows(db)
        db.execute("DELETE FROM requesting_rows WHERE step = ?", (step,))


def _ensure_requesting_rows(db: Database) -> None:
    db.execute(
        f"CREATE TEMP TABLE IF NOT EXISTS requesting_rows (fingerprint {db.dialect.blob_type} NOT NULL, "
        "row_hash BIGINT NOT NULL, step TEXT NOT NULL, sends BIGINT NOT NULL, PRIMARY KEY (fingerprint, row_hash))"
    )


def add_requesting_rows(db: Database, step: str, rows: Iterable[tuple[bytes, int]], *, sends: bool) -> None:
    """Add rows (fingerprint, hash) that need their request. `sends`: the run may send it for them."""
    distinct = list(dict.fromkeys(rows))
    with db.temporary_transaction():
        db.execute(
            f"INSERT INTO requesting_rows SELECT fingerprint, row_hash, CAST(?3 AS TEXT), CAST(?4 AS BIGINT) "
            f"FROM ({_ROWS}) b WHERE true "
            "ON CONFLICT (fingerprint, row_hash) DO UPDATE SET sends = requesting_rows.sends + excluded.sends",
            (*as_list(*zip(*distinct, strict=True)), step, int(sends)),
        )


def record_requesting_rows(db: Database, step: str) -> None:
    """Record the rows that need a request in a step, now that it is enrolled."""
    db.execute(
        "INSERT INTO step_rows SELECT r.id, w.row_hash FROM requesting_rows w JOIN requests r "
        "ON r.fingerprint = w.fingerprint WHERE w.step = ? AND w.sends > 0 ORDER BY 1, 2 ON CONFLICT DO NOTHING",
        (step,),
    )


def find_recorded_rows(db: Database, step: str, rows: Sequence[tuple[bytes, int]]) -> dict[int, RecordedRow]:
    """Return those of the rows (fingerprint, hash) that are recorded, by their index in the list."""
    with db.temporary_transaction():
        _ensure_requesting_rows(db)
        found = db.execute(
            "SELECT b.key, EXISTS (SELECT 1 FROM attempts a WHERE a.request_id = r.id AND a.step = ?3 "
            "AND a.state <> 'refused'), EXISTS (SELECT 1 FROM requesting_rows w WHERE w.fingerprint = b.fingerprint "
            "AND w.row_hash = b.row_hash) "
            f"FROM ({_ROWS}) b CROSS JOIN requests r JOIN step_rows s ON s.request_id = r.id "
            "AND s.row_hash = b.row_hash WHERE r.fingerprint = b.fingerprint",
            (*as_list(*zip(*rows, strict=True)), step),
        ).fetchall()
    return {int(index): RecordedRow(bool(sent), bool(requested)) for index, sent, requested in found}


#: Requests by their fingerprints, from the values that `as_list` returns.
_NAMES = f"SELECT {FINGERPRINT} AS fingerprint FROM json_each(CAST(?1 AS TEXT))"
#: Rows with the fingerprint of their request, from the values that `as_list` returns.
_ROWS = f"SELECT key, {FINGERPRINT} AS fingerprint, CAST(value AS BIGINT) AS row_hash FROM json_each(CAST(?1 AS TEXT))"


def begin_plan(db: Database) -> None:
    """Start a plan. No request is planned yet."""
    with db.temporary_transaction():
        db.execute(
            "CREATE TEMP TABLE IF NOT EXISTS planned_requests (step TEXT NOT NULL, "
            f"fingerprint {db.dialect.blob_type} NOT NULL, kind TEXT NOT NULL, PRIMARY KEY (step, fingerprint, kind))"
        )
        db.session.clear_table("planned_requests")


def add_planned(
    db: Database, step: str, fingerprints: Iterable[bytes], kind: Literal["sent", "possible", "known"] = "sent"
) -> set[bytes]:
    """Add requests that a step sends to the plan, may send, or has an answer of. Return those that were not in it."""
    names = list(dict.fromkeys(fingerprints))
    with db.temporary_transaction():
        rows = db.execute(
            f"INSERT INTO planned_requests SELECT CAST(?3 AS TEXT), fingerprint, CAST(?4 AS TEXT) FROM ({_NAMES}) b "
            "WHERE true ON CONFLICT DO NOTHING RETURNING fingerprint",
            (*as_list(names), step, kind),
        ).fetchall()
    return {bytes(name) for (name,) in rows}


class PlannedCounts(NamedTuple):
    """How many distinct requests a step sends, may send beside them, and has in all, with those that are answered."""

    sent: int
    possible: int
    requests: int


def planned_counts(db: Database, step: str, shared_with: Sequence[str]) -> PlannedCounts:
    """Count the requests of a step. What an earlier step (`shared_with`) sends is not sent again."""
    names = ", ".join(["''", *("?" for _ in shared_with)])
    sent, sent_or_possible, requests = db.execute(
        "SELECT count(DISTINCT fingerprint) FILTER (WHERE kind = 'sent' AND NOT is_shared), "
        "count(DISTINCT fingerprint) FILTER (WHERE kind <> 'known' AND NOT is_shared), count(DISTINCT fingerprint) "
        "FROM (SELECT fingerprint, kind, fingerprint IN (SELECT fingerprint FROM planned_requests WHERE kind = 'sent' "
        f"AND step IN ({names})) AS is_shared FROM planned_requests WHERE step = ?) p",
        (*shared_with, step),
    ).fetchone()
    return PlannedCounts(int(sent), int(sent_or_possible) - int(sent), int(requests))


def begin_bill(db: Database) -> None:
    """Start a bill: the price of each request is shown once in it."""
    with db.temporary_transaction():
        db.execute("CREATE TEMP TABLE IF NOT EXISTS billed_requests (id BIGINT PRIMARY KEY)")
        db.session.clear_table("billed_requests")


def add_to_bill(db: Database, request_ids: Iterable[int]) -> set[int]:
    """Add requests to the bill. Return those that were not in it."""
    with db.temporary_transaction():
        rows = db.execute(
            f"INSERT INTO billed_requests {JSON_NUMBERS.format('?')} WHERE true ON CONFLICT DO NOTHING RETURNING id",
            (to_json_text(list(request_ids)),),
        ).fetchall()
    return {int(number) for (number,) in rows}
