"""Joins the input with the ledger: finds each row's request and decides which requests a run sends.

A pass reads the input once, batch by batch. Its state is in temporary tables, so that `enrich plan` decides with the
same statements as a run, over a ledger that is opened read-only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from enrich.job.locations import LedgerLocation
from enrich.ledger.database import OPEN_TIMEOUT_S, LatencyQueries
from enrich.models import (
    DECISIONS_TO_SEND,
    Call,
    Decision,
    RequestResult,
    RequestSelection,
    RowDecision,
    RowRequest,
    State,
)

if TYPE_CHECKING:
    from enrich.ledger.postgres import FencingToken

#: Exactly the condition of the index `open_attempts`. With other wording SQLite would read all attempts.
OPEN_ATTEMPT = "state IN ('submitting', 'submitted')"
#: Exactly the condition of the index `queue`: requests that this run may send, including those sent before.
QUEUED = "position IS NOT NULL AND state NOT IN ('submitting', 'submitted')"
_TO_SEND = f"decision IN ({', '.join(repr(decision.value) for decision in DECISIONS_TO_SEND)})"
#: The decisions that limit and sample count. They include requests sent since the plan was saved.
_COUNTED_TOWARDS_LIMIT = (
    f"decision IN ({', '.join(repr(decision.value) for decision in (*DECISIONS_TO_SEND, Decision.PLANNED))})"
)

#: Joins that find the id of a request of `batch b`, in the ledger or among this pass's unknown requests.
_KNOWN_REQUESTS = "requests k ON k.fingerprint = b.fingerprint"
_UNKNOWN_REQUESTS = "(SELECT -id AS id, fingerprint FROM strangers) k ON k.fingerprint = b.fingerprint"

#: A LIMIT without effect. It fits into SQLite's 64-bit integers.
MAX_ROWS = 2**62

_PASS_TABLES = (
    # The distinct requests of a batch, each with the first row that has it.
    "CREATE TEMP TABLE batch (i BIGINT PRIMARY KEY, fingerprint {blob} NOT NULL, place BIGINT NOT NULL, grp TEXT)",
    # The id of each request. A request that is not in the ledger goes to `strangers` and gets a negative id.
    "CREATE TEMP TABLE asks (i BIGINT PRIMARY KEY, id BIGINT NOT NULL)",
    "CREATE TEMP TABLE strangers (id {serial}, fingerprint {blob} NOT NULL UNIQUE)",
)
# The key is the id, not the fingerprint: the requests of a file are in the ledger nearly in the file's order.
_SEEN_TABLE = """CREATE TEMP TABLE seen (id BIGINT PRIMARY KEY, position BIGINT NOT NULL, place BIGINT NOT NULL,
grp TEXT, decision TEXT NOT NULL)"""


class EnrollQueries(LatencyQueries):
    """A ledger that is joined with batches of the input."""

    def __init__(
        self,
        location: LedgerLocation,
        *,
        read_only: bool = False,
        fencing_token: FencingToken | None = None,
        open_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> None:
        """Open the ledger. For the parameters see Database."""
        super().__init__(location, read_only=read_only, fencing_token=fencing_token, open_timeout_s=open_timeout_s)
        #: The table `seen` is in the ledger, and all processes of the run share it.
        self._pass_is_shared = self._db.dialect.passes_are_shared and not read_only
        self._selection = RequestSelection()
        self._has_joined_pass = False
        self.retry_on_disconnect(self._create_pass_tables)

    def _create_pass_tables(self) -> None:
        dialect = self._db.dialect
        self._db.begin_temporary()
        for statement in _PASS_TABLES if self._pass_is_shared else (*_PASS_TABLES, _SEEN_TABLE):
            self._db.execute(statement.format(blob=dialect.blob_type, serial=dialect.serial_key))
        self._db.commit()

    def _recreate_pass_tables(self) -> None:
        if not self._db.has_temporary_table("batch"):
            self._create_pass_tables()

    def reconnect(self, failure: BaseException) -> bool | None:
        """Reconnect as Database does, and create the temporary tables again: they ended with the old connection."""
        was_committed = super().reconnect(failure)
        if was_committed is not None:
            # The connection may be lost again.
            self.retry_on_disconnect(self._recreate_pass_tables)
        return was_committed

    def begin_pass(self, selection: RequestSelection | None = None) -> None:
        """Start reading the input from its beginning. No request has been seen yet."""
        self._selection = selection or RequestSelection()
        self._has_joined_pass = False
        self._db.clear_table("seen")
        self._db.clear_table("strangers")

    def join_pass(self, selection: RequestSelection) -> None:
        """Join a pass that another process has started with the same `selection`."""
        self._selection = selection
        self._has_joined_pass = True

    def preview(self, requests: Iterable[RowRequest]) -> None:
        """Read the requests of a batch and decide about those new to this pass. Leaves the ledger unchanged."""
        with self._temporary_transaction():
            self._load_batch(requests)
            self._db.execute(
                "INSERT INTO strangers (fingerprint) SELECT fingerprint FROM batch WHERE i NOT IN (SELECT i FROM asks) "
                "ORDER BY i"
            )
            self._match_batch(_UNKNOWN_REQUESTS)
            self._record_seen()

    def enroll(self, call: Call, requests: Iterable[RowRequest]) -> None:
        """Read the requests of a batch and insert the new ones. `fill_queue` queues the selected ones afterwards."""
        params = self._load_batch(requests)
        rows = self._db.execute("SELECT fingerprint FROM batch WHERE i NOT IN (SELECT i FROM asks) ORDER BY i")
        new_fingerprints = [name for (name,) in rows]
        if new_fingerprints:
            canonical = call.canonical()
            self._db.execute("INSERT INTO calls (canonical) VALUES (?) ON CONFLICT DO NOTHING", (canonical,))
            (call_id,) = self._db.execute("SELECT id FROM calls WHERE canonical = ?", (canonical,)).fetchone()
            self._db.executemany(
                "INSERT INTO requests (fingerprint, call_id, params, state) VALUES (?, ?, ?, 'pending') "
                "ON CONFLICT DO NOTHING",
                # Processes that enroll the same requests at once insert them in the same order: no deadlocks.
                [
                    (name, call_id, params[name])
                    for name in (sorted(new_fingerprints) if self._pass_is_shared else new_fingerprints)
                ],
            )
            self._match_batch(_KNOWN_REQUESTS)
        self._record_seen()
        # A purged request has no params. Restore them if it is to be sent again.
        purged = self._db.execute(
            "SELECT fingerprint, id FROM requests WHERE erased_ms IS NOT NULL "
            f"AND id IN (SELECT id FROM asks JOIN seen USING (id) WHERE {_TO_SEND})"
        ).fetchall()
        self._db.executemany(
            "UPDATE requests SET params = ?, erased_ms = NULL WHERE id = ?",
            [(params[name], number) for name, number in purged],
        )

    def apply_limits(self) -> None:
        """Exclude requests once the whole input was read: by per-group limit, then sample, then limit."""
        with self._temporary_transaction():
            self._apply_limits(self._selection)

    def _apply_limits(self, selection: RequestSelection) -> None:
        if selection.max_per_group is not None:
            # Requests sent before count towards the limit first.
            self._exclude(
                Decision.CAPPED,
                "SELECT id FROM (SELECT id, decision, row_number() OVER "
                "(PARTITION BY grp ORDER BY decision = 'new', place) AS number FROM seen WHERE grp IS NOT NULL) "
                "AS grouped WHERE decision = 'new' AND number > ?",
                min(selection.max_per_group, MAX_ROWS),
            )
        if selection.sample is not None:
            (count,) = self._db.execute(f"SELECT count(*) FROM seen WHERE {_COUNTED_TOWARDS_LIMIT}").fetchone()
            self._db.execute("CREATE TEMP TABLE chosen (number BIGINT PRIMARY KEY)")
            numbers = stratified_sample(count, selection.sample, selection.seed)
            self._db.executemany("INSERT INTO chosen VALUES (?)", ((number,) for number in numbers))
            self._exclude(
                Decision.NOT_SAMPLED,
                "SELECT id FROM (SELECT id, row_number() OVER (ORDER BY position) - 1 AS number "
                f"FROM seen WHERE {_COUNTED_TOWARDS_LIMIT}) AS counted "
                "WHERE NOT EXISTS (SELECT 1 FROM chosen WHERE chosen.number = counted.number)",
            )
            self._db.execute("DROP TABLE chosen")
        if selection.limit is not None:
            self._exclude(
                Decision.OVER_LIMIT,
                f"SELECT id FROM seen WHERE {_COUNTED_TOWARDS_LIMIT} ORDER BY place LIMIT {MAX_ROWS} OFFSET ?",
                min(selection.limit, MAX_ROWS),
            )

    def fill_queue(self) -> None:
        """Queue the selected requests. Leads that left the file are removed from the queue and never paid for.

        The queue position is valid for this run only, and so is `--retry`. Running requests get a position too: if they
        fail at no charge, they are sent again. When the user limits the number of requests, this applies only to
        requests that this selection has sent.
        """
        self._db.execute(f"UPDATE requests SET position = NULL WHERE {QUEUED}")
        open_request_ids = f"(SELECT request_id FROM attempts WHERE {OPEN_ATTEMPT})"
        self._db.execute(f"UPDATE requests SET position = NULL WHERE id IN {open_request_ids}")
        waiting = "" if self._selection.is_limited else " OR decision = 'waiting'"
        planned = f"decision = 'planned' AND id IN {open_request_ids}"
        self._db.execute(
            "UPDATE requests SET position = (SELECT place FROM seen WHERE seen.id = requests.id) "
            f"WHERE id IN (SELECT id FROM seen WHERE {_TO_SEND}{waiting} OR {planned})"
        )

    def accept_in_doubt_as_failed(self) -> int:
        """Mark unconfirmed (`in_doubt`) requests of this pass as failed (edge f, `--accept in_doubt`).

        Return how many.

        Their attempts stay `in_doubt` on record.
        """
        accepted = self._db.execute(
            "UPDATE requests SET state = 'failed' WHERE state = 'in_doubt' AND id IN (SELECT id FROM seen)"
        ).rowcount
        self._db.execute("UPDATE seen SET decision = 'failed' WHERE decision = 'in_doubt'")
        return accepted

    def decision_counts(self) -> dict[Decision, int]:
        """Count the distinct requests of this pass by decision."""
        rows = self._db.execute("SELECT decision, count(*) FROM seen GROUP BY 1")
        return {Decision(decision): count for decision, count in rows}

    def oldest_answer_ms(self) -> int | None:
        """Return when the oldest answer reused in this pass was settled (ms). None: no answer is reused."""
        (oldest_ms,) = self._db.execute(
            "SELECT min(a.settled_ms) FROM seen s JOIN requests r ON r.id = s.id "
            "JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) WHERE s.decision IN ('found', 'not_found')"
        ).fetchone()
        return None if oldest_ms is None else int(oldest_ms)

    def row_decisions(self, requests: Iterable[RowRequest]) -> Iterator[RowDecision]:
        """Yield the decision for each row of a batch. Call it after the whole input was read."""
        rows = list(requests)
        with self._temporary_transaction():
            self._load_batch(rows)
            known = self._db.execute(
                "SELECT b.fingerprint, s.position, s.decision, a.settled_ms "
                f"FROM asks {self._join} batch b ON b.i = asks.i JOIN seen s ON s.id = asks.id "
                "LEFT JOIN requests r ON r.id = asks.id "
                "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id)"
            )
            by_fingerprint = {
                name: (first, Decision(decision), settled_ms) for name, first, decision, settled_ms in known
            }
        for row in rows:
            if row.fingerprint in by_fingerprint:
                yield RowDecision(row.position, *by_fingerprint[row.fingerprint])

    def enrolled_counts(self) -> dict[State, int]:
        """Count the distinct requests of this pass by state. Queued requests count as pending."""
        rows = self._db.execute(
            "SELECT CASE WHEN r.position IS NOT NULL AND r.state NOT IN ('submitting', 'submitted') "
            "THEN 'pending' ELSE r.state END, count(*) "
            "FROM seen s JOIN requests r ON r.id = s.id GROUP BY 1"
        )
        return {State(state): count for state, count in rows}

    def queued_count(self) -> int:
        """Count the queued requests that are not running."""
        (count,) = self._db.execute(f"SELECT count(*) FROM requests WHERE {QUEUED}").fetchone()
        return int(count)

    def request_results(self, requests: Iterable[RowRequest]) -> list[RequestResult]:
        """Return the result of each request of a batch. Leave out those never enrolled, unless they are capped."""
        if self._has_joined_pass:
            self._load_batch(requests)  # every request was seen already, and other processes may be reading `seen`
        else:
            self.preview(requests)
        rows = self._db.execute(
            "SELECT asks.i, CAST(s.position = asks.i AS INTEGER), "
            "CASE WHEN r.answer_id IS NULL THEN coalesce(r.state, 'pending') ELSE a.state END, "
            "a.answer, a.error, a.provider, a.credits, a.task_id, a.settled_ms, a.id, "
            "CAST(s.decision = 'capped' AS INTEGER), a.erased_ms "
            f"FROM asks {self._join} seen s ON s.id = asks.id LEFT JOIN requests r ON r.id = asks.id "
            "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) "
            "WHERE asks.id > 0 OR s.decision = 'capped' ORDER BY asks.i"
        )
        return list(map(RequestResult._make, rows))

    @contextmanager
    def _temporary_transaction(self) -> Iterator[None]:
        """Use the open transaction, or open one that writes only to temporary tables."""
        if self._db.in_transaction:
            yield
            return
        self._db.begin_temporary()
        try:
            yield
            self._db.commit()
        except BaseException:
            self._db.rollback()
            raise

    def _load_batch(self, requests: Iterable[RowRequest]) -> dict[bytes, str]:
        """Load the distinct requests of a batch and find their ids. Return their params by fingerprint."""
        rows = list(requests)
        # Of several rows with one request, the first row sets the group and the lowest queue position counts.
        distinct = {row.fingerprint: row for row in reversed(rows)}
        first = list(reversed(distinct.values()))
        self._db.clear_table("batch")
        self._db.clear_table("asks")
        # Takes a fifth of the time of row-by-row inserts.
        self._db.execute(
            "INSERT INTO batch SELECT CAST(value AS BIGINT), substr(?2, CAST(16 * key + 1 AS INTEGER), 16), "
            "CAST(value AS BIGINT), NULL FROM json_each(CAST(?1 AS TEXT))",
            (json.dumps([row.position for row in first]), b"".join([row.fingerprint for row in first])),
        )
        if any(row.queue_position is not None or row.group is not None for row in first):
            queue_positions: dict[bytes, int] = {}
            for position, fingerprint, _, given_position, _ in rows:
                queue_position = position if given_position is None else given_position
                queue_positions[fingerprint] = min(queue_position, queue_positions.get(fingerprint, queue_position))
            self._db.executemany(
                "UPDATE batch SET place = ?, grp = ? WHERE i = ?",
                [(queue_positions[row.fingerprint], row.group, row.position) for row in first],
            )
        self._db.analyze("batch")
        # An unknown request stays unknown in this pass, even if another process enrolls it meanwhile.
        self._match_batch(_UNKNOWN_REQUESTS)
        self._match_batch(_KNOWN_REQUESTS)
        return {name: row.params for name, row in distinct.items()}

    @property
    def _join(self) -> str:
        return self._db.dialect.ordered_join

    def _match_batch(self, join: str) -> None:
        self._db.execute(
            f"INSERT INTO asks SELECT b.i, k.id FROM batch b {self._join} {join} WHERE true ON CONFLICT DO NOTHING"
        )
        self._db.analyze("asks")

    def _record_seen(self) -> None:
        self._db.execute(
            f"INSERT INTO seen SELECT asks.id, b.i, b.place, b.grp, {self._decision_sql()} "
            f"FROM asks {self._join} batch b ON b.i = asks.i LEFT JOIN requests r ON r.id = asks.id WHERE true "
            # Batches may come in any order.
            "ORDER BY asks.id ON CONFLICT (id) DO UPDATE SET "
            "place = CASE WHEN excluded.place < seen.place THEN excluded.place ELSE seen.place END, "
            "grp = CASE WHEN excluded.position < seen.position THEN excluded.grp ELSE seen.grp END, "
            "position = CASE WHEN excluded.position < seen.position THEN excluded.position ELSE seen.position END "
            "WHERE excluded.place < seen.place OR excluded.position < seen.position"
        )

    def _decision_sql(self) -> str:
        """Return the SQL for the decision about a request before the whole input was read."""
        selection = self._selection
        newest = "EXISTS (SELECT 1 FROM attempts a WHERE a.id = r.attempt_id AND {})".format
        cases: dict[str, Decision] = {}
        if selection.after_execution is not None:
            settled = newest(
                f"a.settled_in > {selection.after_execution:d} AND a.execution_id <= {selection.after_execution:d}"
            )
            # Requests that were waiting when the plan was saved are not among those it counted to be sent.
            cases[f"r.state = 'pending' AND {settled}"] = Decision.WAITING
            cases[f"r.state <> 'pending' AND {newest(f'a.execution_id > {selection.after_execution:d}')}"] = (
                Decision.PLANNED
            )
            cases |= {f"r.state = '{state}' AND {settled}": Decision(state.value) for state in selection.retry}
        cases["r.state IS NULL OR r.state = 'pending'"] = Decision.NEW
        if selection.no_active_run:
            # The next run starts by marking these `in_doubt`.
            is_retried = State.IN_DOUBT in selection.retry
            cases["r.state = 'submitting'"] = Decision.RETRY if is_retried else Decision.IN_DOUBT
        cases[f"r.{OPEN_ATTEMPT}"] = Decision.WAITING
        cases |= {f"r.state = '{state}'": Decision.RETRY for state in selection.retry}
        for state, before_ms in selection.refresh_before_ms.items():
            cases[f"r.state = '{state}' AND {newest(f'a.settled_ms < {before_ms:d}')}"] = Decision.REFRESH
        return "CASE " + "".join(f"WHEN {case} THEN '{name}' " for case, name in cases.items()) + "ELSE r.state END"

    def _exclude(self, decision: Decision, which: str, *values: object) -> None:
        self._db.execute(f"UPDATE seen SET decision = '{decision}' WHERE id IN ({which})", values)


def stratified_sample(count: int, sample: int, seed: int) -> list[int]:
    """Choose `sample` of the numbers below `count`: one random number from each of `sample` equal ranges."""
    sample = min(sample, count)
    rng = random.Random(seed)  # noqa: S311 - sampling needs no cryptographic randomness
    stratum_bounds = [number * count // sample for number in range(sample + 1)] if sample else []
    return [rng.randrange(low, high) for low, high in pairwise(stratum_bounds)]
