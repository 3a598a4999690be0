"""A ledger looked back at as a whole: what each execution settled, how long answers took, who was answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from enrich.store.figures import SINCE_EXECUTION, CountQueries

_SETTLED_BY_JOB = "a.settled_in IN (SELECT id FROM executions WHERE job = ?1)"
#: A failure at no charge that was taken back is no fate of its request: another attempt tells it.
_RETRIED_FAILURE = (
    "a.state = 'failed' AND (EXISTS (SELECT 1 FROM attempts b WHERE b.request_id = a.request_id "
    "AND b.previous_id = a.id AND b.came_from = 'pending') "
    "OR EXISTS (SELECT 1 FROM requests r WHERE r.id = a.request_id AND r.attempt_id = a.id AND r.state = 'pending'))"
)


class ReportedExecutionRow(NamedTuple):
    """One execution; times in milliseconds since 1970 (UTC), credits in millionths, JSON as text; None: not known."""

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
    """A ledger that can be looked back at."""

    def job_executions(self, job: str) -> list[ReportedExecutionRow]:
        """Return the executions of a job, oldest first."""
        rows = self._db.execute(
            f"SELECT {', '.join(ReportedExecutionRow._fields)} FROM executions WHERE job = ? ORDER BY id", (job,)
        )
        return list(map(ReportedExecutionRow._make, rows))

    def newest_execution_id(self) -> int:
        """Return the number of the newest execution of any job, 0 when there is none."""
        (number,) = self._db.execute("SELECT coalesce(max(id), 0) FROM executions").fetchone()
        return int(number)

    def outcome_counts(self, job: str) -> list[tuple[int, str, int]]:
        """Count the requests that each execution of a job settled: execution, state, number."""
        return self._db.execute(
            f"SELECT a.settled_in, a.state, count(*) FROM attempts a WHERE {_SETTLED_BY_JOB} AND NOT ({_RETRIED_FAILURE}) "
            "GROUP BY 1, 2",
            (job,),
        ).fetchall()

    def latencies(self, job: str) -> Iterator[int]:
        """Yield how long the tasks of a job took from the POST to the answer (ms), the shortest first.

        What a later execution fetched is left out: it tells when we came back, not how long it took.
        """
        rows = self._db.stream(
            "SELECT a.settled_ms - a.submitted_ms FROM attempts a WHERE a.settled_in = a.execution_id "
            f"AND {_SETTLED_BY_JOB} AND a.state IN ('found', 'not_found', 'failed') AND a.submitted_ms <= a.settled_ms "
            "AND coalesce(a.place, 0) = 0 ORDER BY 1",
            (job,),
        )
        return (int(wait) for (wait,) in rows)

    def throughput(self, execution_id: int, start_ms: int, width_ms: int) -> tuple[dict[int, int], dict[int, int]]:
        """Count what an execution submitted and what it settled, for each stretch of its time."""
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
        """Tell when an execution last wrote down an answer (ms)."""
        (at_ms,) = self._db.execute(
            "SELECT max(settled_ms) FROM attempts WHERE settled_in = ?", (execution_id,)
        ).fetchone()
        return None if at_ms is None else int(at_ms)

    def answered_params(self, job: str, execution_id: int | None = None) -> Iterator[tuple[str, bool, float | None]]:
        """Yield the params (JSON, as sent) that a job got an answer to, or one of its executions; the last one counts.

        With each: was it found, and what it cost in millionths (None: not known); of a task of many an equal part.
        What was forgotten or purged is left out.
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
        """Return all waterfalls as last described, by identifier."""
        rows = self._db.execute("SELECT identifier, description FROM waterfalls")
        return {identifier: json.loads(description) for identifier, description in rows}

    def has_other_jobs(self, job: str) -> bool:
        """Tell whether another job has run with this ledger."""
        row = self._db.execute("SELECT EXISTS (SELECT 1 FROM executions WHERE job <> ?)", (job,)).fetchone()
        return bool(row[0])


def _time_bin(column: str) -> str:
    """Write which stretch of ?3 ms since ?2 a time is in."""
    return f"CASE WHEN {column} > ?2 THEN ({column} - ?2) / ?3 ELSE 0 END"
