"""What a ledger adds up to: counts, credits, experience. Looks only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from enrich.model import Call, SettledAttempt, State
from enrich.store.intake import OPEN_ATTEMPT, EnrollQueries

#: So many of the newest attempts tell what a request costs today.
PRICE_SAMPLE_SIZE = 100_000
#: Attempts stand in the order of their executions: those of ?1 and later ones are found without reading millions.
SINCE_EXECUTION = "id > coalesce((SELECT id FROM attempts WHERE execution_id < ?1 ORDER BY id DESC LIMIT 1), 0)"


class InDoubtSummary(NamedTuple):
    """Requests in doubt: `most` is what they may have cost (millionths), the oldest is of `execution` at `since_ms`."""

    number: int
    max_cost: int
    oldest_execution_id: int
    oldest_ms: int


class CountQueries(EnrollQueries):
    """A ledger that can be counted."""

    def state_counts(self) -> dict[State, int]:
        """Count all requests by state."""
        # To group millions would sort them, and most are of two states.
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
        """Sum the known credits of all answers (millionths), and count those whose price is not known."""
        # Each execution has its sums; to read all answers would take long.
        row = self._db.execute("SELECT coalesce(sum(spent), 0), coalesce(sum(unknown), 0) FROM executions").fetchone()
        return int(row[0]), int(row[1])

    def execution_outcome_counts(self, execution_id: int) -> dict[State, int]:
        """Count what the new requests of an execution have come to; POSTs that the API refused are none."""
        rows = self._db.execute(
            f"SELECT state, count(*) FROM attempts WHERE {SINCE_EXECUTION} AND execution_id = ?1 AND state <> 'refused' "
            "AND came_from = 'pending' GROUP BY state",
            (execution_id,),
        )
        return {State(state): count for state, count in rows}

    def sent_since(self, execution_id: int, job: str) -> int:
        """Count the requests that were asked for a job after an execution; what is pending again is none of them."""
        (count,) = self._db.execute(
            "SELECT count(*) FROM requests r JOIN attempts a ON a.id = r.attempt_id "
            "JOIN executions e ON e.id = a.execution_id WHERE e.id > ? AND e.job = ? AND r.state <> 'pending'",
            (execution_id, job),
        ).fetchone()
        return int(count)

    def settled_attempts(self, job: str, execution_id: int | None = None) -> Iterator[SettledAttempt]:
        """Yield the attempts that the executions of a job settled, or one of them, execution by execution."""
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
        """Sum up what those may cost that are at the API (millionths): they settle in the next execution."""
        row = self._db.execute(f"SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT}").fetchone()
        return int(row[0])

    def has_open_since(self, since_ms: float) -> bool:
        """Tell whether anything that was asked since then (ms) has no answer yet."""
        row = self._db.execute(
            f"SELECT EXISTS (SELECT 1 FROM attempts WHERE {OPEN_ATTEMPT} "
            "AND (state = 'submitting' OR submitted_ms > ?))",
            (since_ms,),
        ).fetchone()
        return bool(row[0])

    def average_price(self, call: Call) -> tuple[int, float | None]:
        """Count the newest answers to a call whose price is known, and average what they cost (millionths)."""
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
        """Tell how often a task was polled so far, on average; None before the first."""
        (polls, submitted) = self._db.execute(
            f"SELECT sum(CAST(receipt{self._db.dialect.as_json}->>'polls' AS BIGINT)), sum(submitted) "
            "FROM executions WHERE receipt IS NOT NULL"
        ).fetchone()
        (additional_rows,) = self._db.execute(
            "SELECT coalesce(sum(size - 1), 0) FROM bundles WHERE settled_ms IS NOT NULL"
        ).fetchone()
        return polls / max(1, submitted - additional_rows) if submitted else None

    def cost_overruns(self, execution_id: int) -> tuple[int, int]:
        """Count the tasks settled in an execution that cost more than was reserved, and sum up by how much."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(risen), 0) FROM (SELECT sum(paid) - sum(reserved) AS risen FROM billed "
            "WHERE settled_in = ? AND paid IS NOT NULL GROUP BY coalesce(bundle_id, -id)) AS tasks WHERE risen > 0",
            (execution_id,),
        ).fetchone()
        return int(row[0]), int(row[1])

    def in_doubt_summary(self) -> InDoubtSummary | None:
        """Sum up the requests in doubt, of all executions; None: there is none."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(a.reserved), 0), min(a.execution_id), min(a.claimed_ms) "
            "FROM requests r JOIN attempts a ON a.id = r.attempt_id WHERE r.state = 'in_doubt'"
        ).fetchone()
        return InDoubtSummary(*map(int, row)) if row[0] else None

    def credit_movements(self, since: int) -> list[tuple[str, bool, int, int, int]]:
        """Sum up the attempts that were made or settled since an execution.

        Rows are (`known` when the price is, else the attempt's state; was it made since; number; credits; reserved).
        """
        return self._db.execute(
            "SELECT CASE WHEN paid IS NOT NULL THEN 'known' ELSE state END, execution_id >= ?1, "
            f"count(*), coalesce(sum(paid), 0), sum(reserved) FROM billed WHERE state <> 'refused' AND ({SINCE_EXECUTION} "
            f"OR settled_in >= ?1 OR ({OPEN_ATTEMPT} AND state = 'submitted')) "
            "GROUP BY 1, 2",
            (since,),
        ).fetchall()
