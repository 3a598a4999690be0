"""Read-only queries: counts and credits of a ledger, and single requests with all their attempts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from msgspec import Struct

from enrich.databar.task_results import parse_data
from enrich.job.target import Target
from enrich.json_text import parse_json, to_json_text
from enrich.ledger.database import Database
from enrich.ledger.dialect import OPEN_ATTEMPT, SINCE_EXECUTION
from enrich.models import SettledAttempt, State

#: How many of the newest attempts are used to estimate the current price of a request.
PRICE_SAMPLE_SIZE = 100_000
#: How many characters the answers of a batch of rows have at most, by the newest answers of the ledger.
MAX_ANSWER_CHARACTERS = 100_000_000
_ANSWER_SAMPLE_SIZE = 1_000


class InDoubtSummary(NamedTuple):
    """Unconfirmed (`in_doubt`) requests: their maximum cost (millionths), and the run and time (ms) of the oldest."""

    number: int
    max_cost: int
    oldest_execution_id: int
    oldest_ms: int


def max_rows_per_batch(db: Database, answers_per_row: int = 1) -> int:
    """Return how many rows to read at once together with their answers, so that memory is bounded."""
    average = db.value(
        "SELECT coalesce(avg(length(answer)), 0) FROM (SELECT answer FROM attempts WHERE answer IS NOT NULL "
        f"ORDER BY id DESC LIMIT {_ANSWER_SAMPLE_SIZE}) AS newest"
    )
    return max(1, int(MAX_ANSWER_CHARACTERS / max(1.0, float(average) * answers_per_row)))


def state_counts(db: Database) -> dict[State, int]:
    """Count all requests by state."""
    return {State(state): number for state, number in count_by_state(db, "state", "requests").items()}


def count_by_state(db: Database, state: str, source: str) -> dict[str, int]:
    """Count the rows of a source by a state, or by a decision, which is an SQL expression."""
    # Grouping millions of rows would sort them, and most of them have one of two states.
    count, found, not_found = db.execute(
        f"SELECT count(*), count(*) FILTER (WHERE {state} = 'found'), count(*) FILTER (WHERE {state} = 'not_found') "
        f"FROM {source}"
    ).fetchone()
    counts = {"found": found, "not_found": not_found}
    if count > found + not_found:
        others = f"SELECT {state}, count(*) FROM {source} WHERE {state} NOT IN ('found', 'not_found') GROUP BY 1"
        counts |= dict(db.execute(others))
    return {name: number for name, number in counts.items() if number}


def spent_totals(db: Database) -> tuple[int, int]:
    """Return the known credits of all answers (millionths), and the number of answers with an unknown price."""
    # Each run stores its sums. Reading all answers would take long.
    row = db.execute("SELECT coalesce(sum(spent), 0), coalesce(sum(unknown), 0) FROM executions").fetchone()
    return int(row[0]), int(row[1])


def execution_outcome_counts(db: Database, execution_id: int, step: str | None = None) -> dict[State, int]:
    """Count the new requests that a run, or one of its steps, has sent, by the state of their newest attempt.

    Those whose newest POST the API has refused are left out.
    """
    rows = db.execute(
        f"SELECT state, count(*) FROM attempts WHERE {SINCE_EXECUTION} AND execution_id = ?1 "
        "AND state <> 'refused' AND previous_state = 'pending' "
        "AND id = (SELECT r.attempt_id FROM requests r WHERE r.id = request_id) "
        "AND (CAST(?2 AS TEXT) IS NULL OR step = ?2) GROUP BY state",
        (execution_id, step),
    )
    return {State(state): count for state, count in rows}


def sent_since(db: Database, execution_id: int, job: str, step: str = "") -> int:
    """Count the requests sent for a job or one of its steps after a run. Requests pending again do not count."""
    return db.number(
        "SELECT count(*) FROM requests r JOIN attempts a ON a.id = r.attempt_id "
        "JOIN executions e ON e.id = a.execution_id WHERE e.id > ?1 AND e.job = ?2 AND r.state <> 'pending' "
        "AND coalesce(a.step, '') = CAST(?3 AS TEXT)",
        execution_id,
        job,
        step,
    )


def settled_attempts(db: Database, job: str, execution_id: int | None = None) -> Iterator[SettledAttempt]:
    """Yield the attempts settled by the runs of a job, or by one run, in the order of runs."""
    rows = db.stream(
        "SELECT a.settled_execution_id, a.state, c.canonical, r.params, a.paid, a.answer, "
        "a.erased_ms IS NOT NULL OR r.erased_ms IS NOT NULL, a.step, a.provider "
        "FROM billed a JOIN requests r ON r.id = a.request_id JOIN calls c ON c.id = r.call_id "
        "WHERE a.settled_execution_id IN (SELECT id FROM executions WHERE job = ?1 "
        "AND (CAST(?2 AS BIGINT) IS NULL OR id = ?2)) "
        "ORDER BY a.settled_execution_id, a.id",
        (job, execution_id),
    )
    return map(SettledAttempt._make, rows)


def open_reservations(db: Database) -> int:
    """Return the maximum price of all running tasks (millionths). They are settled in the next run."""
    return db.number(f"SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT}")


def unconfirmed_posts(db: Database, execution_id: int) -> int:
    """Count the requests that a run has sent in a POST of which the API has accepted nothing for certain."""
    return db.number(
        f"SELECT count(*) FROM attempts WHERE {SINCE_EXECUTION} AND execution_id = ?1 AND state = 'in_doubt' "
        "AND submitted_ms IS NULL",
        execution_id,
    )


def has_open_since(db: Database, since_ms: float) -> bool:
    """Return whether a request sent after `since_ms` still has no answer."""
    return db.exists(f"FROM attempts WHERE {OPEN_ATTEMPT} AND (state = 'submitting' OR submitted_ms > ?)", since_ms)


def average_price(db: Database, target: Target) -> float | None:
    """Return the average price (millionths) of the newest answers to a target. None: no price is known."""
    (average,) = db.execute(
        "SELECT avg(a.paid) FROM (SELECT request_id, state, paid, task_id FROM billed ORDER BY id DESC LIMIT ?) a "
        "CROSS JOIN requests r JOIN calls c ON c.id = r.call_id "
        "WHERE r.id = a.request_id AND c.canonical = ? AND a.paid IS NOT NULL "
        "AND a.state IN ('found', 'not_found', 'failed') AND a.task_id IS NOT NULL",
        (PRICE_SAMPLE_SIZE, target.canonical()),
    ).fetchone()
    return None if average is None else float(average)


def polls_per_task(db: Database) -> float | None:
    """Return the average number of polls per task. None: nothing was submitted yet."""
    (polls, submitted) = db.execute(
        f"SELECT sum(CAST(summary{db.dialect.as_json}->>'polls' AS BIGINT)), sum(submitted) "
        "FROM executions WHERE summary IS NOT NULL"
    ).fetchone()
    additional_rows = db.value("SELECT coalesce(sum(size - 1), 0) FROM bulk_tasks WHERE settled_ms IS NOT NULL")
    return polls / max(1, submitted - additional_rows) if submitted and polls is not None else None


def cost_overruns(db: Database, execution_id: int) -> tuple[int, int]:
    """Return how many tasks settled in a run cost more than their maximum price, and by how much (millionths)."""
    row = db.execute(
        "SELECT count(*), coalesce(sum(risen), 0) FROM (SELECT sum(paid) - sum(reserved) AS risen FROM billed "
        "WHERE settled_execution_id = ? AND paid IS NOT NULL GROUP BY coalesce(bulk_task_id, -id)) AS tasks WHERE "
        "risen > 0",
        (execution_id,),
    ).fetchone()
    return int(row[0]), int(row[1])


def in_doubt_summary(db: Database) -> InDoubtSummary | None:
    """Return a summary of the unconfirmed requests of all runs. None: there are none."""
    row = db.execute(
        "SELECT count(*), coalesce(sum(a.reserved), 0), min(a.execution_id), min(a.claimed_ms) "
        "FROM requests r JOIN attempts a ON a.id = r.attempt_id WHERE r.state = 'in_doubt'"
    ).fetchone()
    return InDoubtSummary(*map(int, row)) if row[0] else None


def credit_movements(db: Database, since: int) -> list[tuple[str, bool, int, int, int]]:
    """Return totals of the attempts that were made or settled since a run.

    Rows are ('known' if the price is known, else the attempt's state; whether it was made since; count; credits;
    reserved). Credits are millionths.
    """
    return db.execute(
        "SELECT CASE WHEN paid IS NOT NULL THEN 'known' ELSE state END, execution_id >= ?1, "
        "count(*), coalesce(sum(paid), 0), sum(reserved) FROM billed "
        f"WHERE state <> 'refused' AND ({SINCE_EXECUTION} "
        f"OR settled_execution_id >= ?1 OR ({OPEN_ATTEMPT} AND state = 'submitted')) "
        "GROUP BY 1, 2",
        (since,),
    ).fetchall()


_SETTLED_BY_JOB = "a.settled_execution_id IN (SELECT id FROM executions WHERE job = ?1)"
#: Failures at no charge whose request was queued again: a later attempt has the outcome of the request.
_RETRIED_FAILURE = (
    "a.state = 'failed' AND (EXISTS (SELECT 1 FROM attempts b WHERE b.request_id = a.request_id "
    "AND b.previous_id = a.id AND b.previous_state = 'pending') "
    "OR EXISTS (SELECT 1 FROM requests r WHERE r.id = a.request_id AND r.attempt_id = a.id AND r.state = 'pending'))"
)


def outcome_counts(db: Database, job: str) -> list[tuple[int, str, int]]:
    """Count the requests that each run of a job settled: run id, state, count."""
    return db.execute(
        "SELECT a.settled_execution_id, a.state, count(*) FROM attempts a "
        f"WHERE {_SETTLED_BY_JOB} AND NOT ({_RETRIED_FAILURE}) GROUP BY 1, 2",
        (job,),
    ).fetchall()


def settled_counts(db: Database, execution_id: int) -> dict[State, int]:
    """Count the requests that a run settled, by state, with those that the API rejected, which have no task."""
    rows = db.execute(
        "SELECT a.state, count(*) FROM attempts a WHERE (a.settled_execution_id = ?1 OR (a.execution_id = ?1 "
        f"AND a.state = 'failed' AND a.settled_execution_id IS NULL)) AND NOT ({_RETRIED_FAILURE}) GROUP BY 1",
        (execution_id,),
    )
    return {State(state): count for state, count in rows}


def retried_failures(db: Database, job: str) -> dict[str, int]:
    """Count the failures at no charge whose requests were queued again, by step ('' for a job without steps)."""
    return dict(
        db.execute(
            "SELECT coalesce(a.step, ''), count(*) FROM attempts a "
            f"WHERE {_SETTLED_BY_JOB} AND {_RETRIED_FAILURE} GROUP BY 1",
            (job,),
        )
    )


def latencies(db: Database, job: str) -> Iterator[int]:
    """Yield the time from POST to answer of a job's tasks (ms), shortest first.

    Answers fetched by a later run are left out: their time depends on when that run started.
    """
    rows = db.stream(
        "SELECT a.settled_ms - a.submitted_ms FROM attempts a WHERE a.settled_execution_id = a.execution_id "
        f"AND {_SETTLED_BY_JOB} AND a.state IN ('found', 'not_found', 'failed') AND a.submitted_ms <= a.settled_ms "
        "AND coalesce(a.bulk_index, 0) = 0 ORDER BY 1",
        (job,),
    )
    return (wait for (wait,) in rows)


def answered_params(db: Database, job: str, execution_id: int | None) -> Iterator[tuple[str, bool, float | None]]:
    """Yield the params (JSON, as sent) that were answered in a job's runs, or in one run of it.

    Of several entries with the same params the last one counts. With each: whether it was found, and its cost in
    millionths (None: not known), for a bulk task the average per request. Forgotten and purged requests are left
    out.
    """
    rows = db.stream(
        "SELECT r.params, a.state = 'found', "
        "CASE WHEN a.bulk_task_id IS NULL THEN a.credits ELSE b.credits * 1.0 / b.size END "
        "FROM attempts a JOIN requests r ON r.id = a.request_id LEFT JOIN bulk_tasks b ON b.id = a.bulk_task_id "
        f"WHERE {_SETTLED_BY_JOB} AND (CAST(?2 AS BIGINT) IS NULL OR a.settled_execution_id = ?2) "
        "AND a.state IN ('found', 'not_found') "
        "AND r.erased_ms IS NULL ORDER BY a.settled_execution_id, a.id",
        (job, execution_id),
    )
    return ((params, bool(found), credits_) for params, found, credits_ in rows)


def is_answered_field(db: Database, name: str) -> bool:
    """Return whether any answer has a field with this name, inside or outside its result."""
    # The text is compared first: reading a million answers as JSON takes long. In JSON, a name may have escapes or not.
    names = [re.sub("[%_!]", r"!\g<0>", json.dumps(name, ensure_ascii=escaped)) for escaped in (True, False)]
    rows = db.stream(
        "SELECT answer FROM attempts WHERE answer LIKE ? ESCAPE '!' OR answer LIKE ? ESCAPE '!'",
        [f"%{each}%" for each in names],
    )
    for (answer,) in rows:
        parsed = parse_data(parse_json(answer).get("data"))
        if name in parsed.fields or name in (parsed.wrapper or {}):
            return True
    return False


def answers(db: Database, attempt_ids: Iterable[int]) -> Mapping[int, str | None]:
    """Return the answers of attempts. None: there is none, or it was erased."""
    return dict(
        db.execute(
            "SELECT a.id, a.answer FROM json_each(CAST(? AS TEXT)) b CROSS JOIN attempts a "
            "WHERE a.id = CAST(b.value AS BIGINT)",
            (to_json_text(list(attempt_ids)),),
        ).fetchall()
    )


class LedgerTotals(Struct, frozen=True):
    """Totals of the whole ledger, all jobs: credits in millionths, answers of unknown price, unconfirmed, submitted."""

    spent: int
    unknown: int
    in_doubt: int
    submitted: int


def totals(db: Database) -> LedgerTotals:
    """Return the totals of the ledger."""
    in_doubt = db.number("SELECT count(*) FROM requests WHERE state = 'in_doubt'")
    submitted = db.number(f"SELECT count(*) FROM attempts WHERE {OPEN_ATTEMPT} AND state = 'submitted'")
    return LedgerTotals(*spent_totals(db), in_doubt, submitted)


def oldest_open_submission_ms(db: Database) -> int | None:
    """Return when the oldest task that waits for its answer was submitted (ms). None: no task waits."""
    oldest_ms = db.value(f"SELECT min(submitted_ms) FROM attempts WHERE {OPEN_ATTEMPT} AND state = 'submitted'")
    return None if oldest_ms is None else int(oldest_ms)


class RequestRow(Struct, frozen=True):
    """One request: its state, the params sent (JSON), and the call it belongs to."""

    id: int
    fingerprint: bytes
    state: State
    params: str
    call: Mapping[str, Any]
    attempt_id: int | None
    answer_id: int | None


class AttemptRow(Struct, frozen=True):
    """One attempt: a POST and its outcome. Times are milliseconds since 1970 (UTC), credits are millionths."""

    id: int
    execution_id: int
    job: str
    state: str
    task_id: str | None
    claimed_ms: int
    submitted_ms: int | None
    settled_ms: int | None
    settled_execution_id: int | None
    reserved: int
    credits: int | None
    provider: str | None
    error: str | None
    answer: str | None
    #: Size and price (millionths) of the bulk task that it was part of. None: it was sent alone.
    bulk_size: int | None = None
    task_credits: int | None = None


_SELECT_REQUEST = "SELECT r.*, c.canonical FROM requests r JOIN calls c ON c.id = r.call_id "


def find_request(db: Database, fingerprint: bytes) -> RequestRow | None:
    """Find a request by fingerprint. None: the ledger does not have it."""
    return next(map(_request_row, db.rows(_SELECT_REQUEST + "WHERE r.fingerprint = ?", fingerprint)), None)


def find_by_params(db: Database, params: str) -> Iterator[RequestRow]:
    """Yield the requests with the same params, of any call."""
    return map(_request_row, db.rows(_SELECT_REQUEST + "WHERE r.params = ? ORDER BY r.id", params))


def find_by_any_param(db: Database, params: Mapping[str, str]) -> Iterator[RequestRow]:
    """Yield the requests with one of these values in the same param, ignoring case."""
    folded = {name: value.casefold() for name, value in params.items()}
    for row in db.rows(_SELECT_REQUEST + "ORDER BY r.id"):
        sent = json.loads(row["params"])
        if any(str(sent.get(name, "")).casefold() == value for name, value in folded.items()):
            yield _request_row(row)


def attempts(db: Database, request_id: int) -> list[AttemptRow]:
    """Return every attempt of a request, oldest first."""
    rows = db.rows(
        "SELECT a.*, e.job, b.size AS bulk_size, b.credits AS task_credits FROM attempts a "
        "JOIN executions e ON e.id = a.execution_id LEFT JOIN bulk_tasks b ON b.id = a.bulk_task_id "
        "WHERE a.request_id = ? ORDER BY a.id",
        request_id,
    )
    return [AttemptRow(**{name: row[name] for name in AttemptRow.__struct_fields__}) for row in rows]


def _request_row(row: Mapping[str, Any]) -> RequestRow:
    return RequestRow(
        row["id"],
        row["fingerprint"],
        State(row["state"]),
        row["params"],
        json.loads(row["canonical"]),
        row["attempt_id"],
        row["answer_id"],
    )
