"""Read-only queries: counts, credits and history of a ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from enrich.ledger.enroll import OPEN_ATTEMPT, EnrollQueries
from enrich.models import Call, SettledAttempt, State

#: How many of the newest attempts are used to estimate the current price of a request.
PRICE_SAMPLE_SIZE = 100_000
#: Attempt ids follow the order of runs, so the attempts of run ?1 and later are found without reading all of them.
SINCE_EXECUTION = "id > coalesce((SELECT id FROM attempts WHERE execution_id < ?1 ORDER BY id DESC LIMIT 1), 0)"


class InDoubtSummary(NamedTuple):
    """Unconfirmed (`in_doubt`) requests: their maximum cost (millionths), and the run and time (ms) of the oldest."""

    number: int
    max_cost: int
    oldest_execution_id: int
    oldest_ms: int


class CountQueries(EnrollQueries):
    """A ledger with queries for counts and credits."""

    def state_counts(self) -> dict[State, int]:
        """Count all requests by state."""
        # Grouping millions of rows would sort them, and most of them have one of two states.
        count, found, not_found = self._db.execute(
            "SELECT count(*), count(*) FILTER (WHERE state = 'found'), count(*) FILTER (WHERE state = 'not_found') "
            "FROM requests"
        ).fetchone()
        counts = {State.FOUND: found, State.NOT_FOUND: not_found}
        if count > found + not_found:
            rows = self._db.execute(
                "SELECT state, count(*) FROM requests WHERE state NOT IN ('found', 'not_found') GROUP BY state"
            )
            counts |= {State(state): number for state, number in rows}
        return {state: number for state, number in counts.items() if number}

    def spent_totals(self) -> tuple[int, int]:
        """Return the known credits of all answers (millionths), and the number of answers with an unknown price."""
        # Each run stores its sums. Reading all answers would take long.
        row = self._db.execute("SELECT coalesce(sum(spent), 0), coalesce(sum(unknown), 0) FROM executions").fetchone()
        return int(row[0]), int(row[1])

    def execution_outcome_counts(self, execution_id: int) -> dict[State, int]:
        """Count the new requests of a run by state, without POSTs that the API refused."""
        rows = self._db.execute(
            f"SELECT state, count(*) FROM attempts WHERE {SINCE_EXECUTION} AND execution_id = ?1 "
            "AND state <> 'refused' AND came_from = 'pending' GROUP BY state",
            (execution_id,),
        )
        return {State(state): count for state, count in rows}

    def sent_since(self, execution_id: int, job: str) -> int:
        """Count the requests sent for a job after a run. Requests that are pending again do not count."""
        (count,) = self._db.execute(
            "SELECT count(*) FROM requests r JOIN attempts a ON a.id = r.attempt_id "
            "JOIN executions e ON e.id = a.execution_id WHERE e.id > ? AND e.job = ? AND r.state <> 'pending'",
            (execution_id, job),
        ).fetchone()
        return int(count)

    def settled_attempts(self, job: str, execution_id: int | None = None) -> Iterator[SettledAttempt]:
        """Yield the attempts settled by the runs of a job, or by one run, in the order of runs."""
        rows = self._db.stream(
            "SELECT a.settled_in, a.state, c.canonical, r.params, a.paid, a.answer, "
            "a.erased_ms IS NOT NULL OR r.erased_ms IS NOT NULL "
            "FROM billed a JOIN requests r ON r.id = a.request_id JOIN calls c ON c.id = r.call_id "
            "WHERE a.settled_in IN (SELECT id FROM executions WHERE job = ?1 "
            "AND (CAST(?2 AS BIGINT) IS NULL OR id = ?2)) "
            "ORDER BY a.settled_in, a.id",
            (job, execution_id),
        )
        return map(SettledAttempt._make, rows)

    def open_reservations(self) -> int:
        """Return the maximum price of all running tasks (millionths). They are settled in the next run."""
        row = self._db.execute(f"SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT}").fetchone()
        return int(row[0])

    def has_open_since(self, since_ms: float) -> bool:
        """Return whether a request sent after `since_ms` still has no answer."""
        row = self._db.execute(
            f"SELECT EXISTS (SELECT 1 FROM attempts WHERE {OPEN_ATTEMPT} "
            "AND (state = 'submitting' OR submitted_ms > ?))",
            (since_ms,),
        ).fetchone()
        return bool(row[0])

    def average_price(self, call: Call) -> tuple[int, float | None]:
        """Return the number and average price (millionths) of the newest answers to a call whose price is known."""
        row = self._db.execute(
            "SELECT count(*), avg(a.paid) FROM (SELECT request_id, state, paid, task_id FROM billed "
            "ORDER BY id DESC LIMIT ?) a "
            f"{self._join} requests r ON r.id = a.request_id JOIN calls c ON c.id = r.call_id "
            "WHERE c.canonical = ? AND a.paid IS NOT NULL "
            "AND a.state IN ('found', 'not_found', 'failed') AND a.task_id IS NOT NULL",
            (PRICE_SAMPLE_SIZE, call.canonical()),
        ).fetchone()
        return int(row[0]), row[1]

    def polls_per_task(self) -> float | None:
        """Return the average number of polls per task. None: nothing was submitted yet."""
        (polls, submitted) = self._db.execute(
            f"SELECT sum(CAST(receipt{self._db.dialect.as_json}->>'polls' AS BIGINT)), sum(submitted) "
            "FROM executions WHERE receipt IS NOT NULL"
        ).fetchone()
        (additional_rows,) = self._db.execute(
            "SELECT coalesce(sum(size - 1), 0) FROM bundles WHERE settled_ms IS NOT NULL"
        ).fetchone()
        return polls / max(1, submitted - additional_rows) if submitted else None

    def cost_overruns(self, execution_id: int) -> tuple[int, int]:
        """Return how many tasks settled in a run cost more than their maximum price, and by how much (millionths)."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(risen), 0) FROM (SELECT sum(paid) - sum(reserved) AS risen FROM billed "
            "WHERE settled_in = ? AND paid IS NOT NULL GROUP BY coalesce(bundle_id, -id)) AS tasks WHERE risen > 0",
            (execution_id,),
        ).fetchone()
        return int(row[0]), int(row[1])

    def in_doubt_summary(self) -> InDoubtSummary | None:
        """Return a summary of the unconfirmed requests of all runs. None: there are none."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(a.reserved), 0), min(a.execution_id), min(a.claimed_ms) "
            "FROM requests r JOIN attempts a ON a.id = r.attempt_id WHERE r.state = 'in_doubt'"
        ).fetchone()
        return InDoubtSummary(*map(int, row)) if row[0] else None

    def credit_movements(self, since: int) -> list[tuple[str, bool, int, int, int]]:
        """Return totals of the attempts that were made or settled since a run.

        Rows are ('known' if the price is known, else the attempt's state; whether it was made since; count; credits;
        reserved). Credits are millionths.
        """
        return self._db.execute(
            "SELECT CASE WHEN paid IS NOT NULL THEN 'known' ELSE state END, execution_id >= ?1, "
            "count(*), coalesce(sum(paid), 0), sum(reserved) FROM billed "
            f"WHERE state <> 'refused' AND ({SINCE_EXECUTION} "
            f"OR settled_in >= ?1 OR ({OPEN_ATTEMPT} AND state = 'submitted')) "
            "GROUP BY 1, 2",
            (since,),
        ).fetchall()


_SETTLED_BY_JOB = "a.settled_in IN (SELECT id FROM executions WHERE job = ?1)"
#: Failures at no charge whose request was queued again: a later attempt has the outcome of the request.
_RETRIED_FAILURE = (
    "a.state = 'failed' AND (EXISTS (SELECT 1 FROM attempts b WHERE b.request_id = a.request_id "
    "AND b.previous_id = a.id AND b.came_from = 'pending') "
    "OR EXISTS (SELECT 1 FROM requests r WHERE r.id = a.request_id AND r.attempt_id = a.id AND r.state = 'pending'))"
)


class ReportedExecutionRow(NamedTuple):
    """One run. Times are milliseconds since 1970 (UTC), credits are millionths, JSON is text; None: not known."""

    id: int
    started_ms: int
    ended_ms: int | None
    exit_code: int | None
    submitted: int
    spent: int
    unknown: int
    balance_before: int | None
    balance_after: int | None
    receipt: str | None
    pulse: str | None


class HistoryQueries(CountQueries):
    """A ledger with queries for past runs."""

    def job_executions(self, job: str) -> list[ReportedExecutionRow]:
        """Return the runs of a job, oldest first."""
        rows = self._db.execute(
            f"SELECT {', '.join(ReportedExecutionRow._fields)} FROM executions WHERE job = ? ORDER BY id", (job,)
        )
        return list(map(ReportedExecutionRow._make, rows))

    def newest_execution_id(self) -> int:
        """Return the id of the newest run of any job, 0 when there is none."""
        (number,) = self._db.execute("SELECT coalesce(max(id), 0) FROM executions").fetchone()
        return int(number)

    def outcome_counts(self, job: str) -> list[tuple[int, str, int]]:
        """Count the requests that each run of a job settled: run id, state, count."""
        return self._db.execute(
            "SELECT a.settled_in, a.state, count(*) FROM attempts a "
            f"WHERE {_SETTLED_BY_JOB} AND NOT ({_RETRIED_FAILURE}) GROUP BY 1, 2",
            (job,),
        ).fetchall()

    def latencies(self, job: str) -> Iterator[int]:
        """Yield the time from POST to answer of a job's tasks (ms), shortest first.

        Answers fetched by a later run are left out: their time depends on when that run started.
        """
        rows = self._db.stream(
            "SELECT a.settled_ms - a.submitted_ms FROM attempts a WHERE a.settled_in = a.execution_id "
            f"AND {_SETTLED_BY_JOB} AND a.state IN ('found', 'not_found', 'failed') AND a.submitted_ms <= a.settled_ms "
            "AND coalesce(a.place, 0) = 0 ORDER BY 1",
            (job,),
        )
        return (int(wait) for (wait,) in rows)

    def throughput(self, execution_id: int, start_ms: int, width_ms: int) -> tuple[dict[int, int], dict[int, int]]:
        """Count what a run submitted and settled per time bin of `width_ms`, starting at `start_ms`."""
        submitted = self._db.execute(
            f"SELECT {_time_bin('submitted_ms')}, count(*) FROM attempts WHERE {SINCE_EXECUTION} AND execution_id = ?1 "
            "AND submitted_ms IS NOT NULL GROUP BY 1",
            (execution_id, start_ms, width_ms),
        )
        settled = self._db.execute(
            f"SELECT {_time_bin('settled_ms')}, count(*) FROM attempts WHERE settled_in = ?1 GROUP BY 1",
            (execution_id, start_ms, width_ms),
        )
        return dict(submitted), dict(settled)

    def last_answer_ms(self, execution_id: int) -> int | None:
        """Return when a run last stored an answer (ms). None: never."""
        (at_ms,) = self._db.execute(
            "SELECT max(settled_ms) FROM attempts WHERE settled_in = ?", (execution_id,)
        ).fetchone()
        return None if at_ms is None else int(at_ms)

    def answered_params(self, job: str, execution_id: int | None = None) -> Iterator[tuple[str, bool, float | None]]:
        """Yield the params (JSON, as sent) that were answered in a job's runs, or in one run of it.

        Of several entries with the same params the last one counts. With each: whether it was found, and its cost in
        millionths (None: not known), for a bulk task the average per request. Forgotten and purged requests are left
        out.
        """
        rows = self._db.stream(
            "SELECT r.params, a.state = 'found', "
            "CASE WHEN a.bundle_id IS NULL THEN a.credits ELSE b.credits * 1.0 / b.size END "
            "FROM attempts a JOIN requests r ON r.id = a.request_id LEFT JOIN bundles b ON b.id = a.bundle_id "
            f"WHERE {_SETTLED_BY_JOB} AND (CAST(?2 AS BIGINT) IS NULL OR a.settled_in = ?2) "
            "AND a.state IN ('found', 'not_found') "
            "AND r.erased_ms IS NULL ORDER BY a.settled_in, a.id",
            (job, execution_id),
        )
        return ((params, bool(found), credits_) for params, found, credits_ in rows)

    def waterfalls(self) -> dict[str, Any]:
        """Return the latest description of all waterfalls by identifier."""
        rows = self._db.execute("SELECT identifier, description FROM waterfalls")
        return {identifier: json.loads(description) for identifier, description in rows}

    def has_other_jobs(self, job: str) -> bool:
        """Return whether another job has run with this ledger."""
        row = self._db.execute("SELECT EXISTS (SELECT 1 FROM executions WHERE job <> ?)", (job,)).fetchone()
        return bool(row[0])


def _time_bin(column: str) -> str:
    """Return the SQL for the number of a time bin: ?3 ms long, counted from ?2."""
    return f"CASE WHEN {column} > ?2 THEN ({column} - ?2) / ?3 ELSE 0 END"
