"""From the input to the queue: what each row's question is to the ledger, and what an execution wants.

A pass reads the input once, batch by batch. What it has seen lies in temporary tables, so that
`enrich plan` decides by the same statements as a run, over a ledger that is only looked into.
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

#: Word for word the condition of the index `open_attempts`: without it SQLite would read all attempts.
OPEN_ATTEMPT = "state IN ('submitting', 'submitted')"
#: Likewise of the index `queue`: what this execution may ask, whatever it has been asked before.
QUEUED = "position IS NOT NULL AND state NOT IN ('submitting', 'submitted')"
_TO_SEND = f"decision IN ({', '.join(repr(decision.value) for decision in DECISIONS_TO_SEND)})"
#: What a limit and a sample count: also what was asked since the plan that says them.
_COUNTED_TOWARDS_LIMIT = (
    f"decision IN ({', '.join(repr(decision.value) for decision in (*DECISIONS_TO_SEND, Decision.PLANNED))})"
)

#: Where the number of a question of `batch b` is looked up.
_KNOWN_REQUESTS = "requests k ON k.fingerprint = b.fingerprint"
_UNKNOWN_REQUESTS = "(SELECT -id AS id, fingerprint FROM strangers) k ON k.fingerprint = b.fingerprint"

#: More than SQLite's integers can't count.
MAX_ROWS = 2**62

_PASS_TABLES = (
    # The distinct questions of a batch, each with the first row that asks it.
    "CREATE TEMP TABLE batch (i BIGINT PRIMARY KEY, fingerprint {blob} NOT NULL, place BIGINT NOT NULL, grp TEXT)",
    # Which requests they are. What the ledger does not know is a stranger, whose number is negative.
    "CREATE TEMP TABLE asks (i BIGINT PRIMARY KEY, id BIGINT NOT NULL)",
    "CREATE TEMP TABLE strangers (id {serial}, fingerprint {blob} NOT NULL UNIQUE)",
)
# By number rather than by fingerprint: a file's requests stand in the ledger nearly in its order.
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
        """Open the ledger as Database does."""
        super().__init__(location, read_only=read_only, fencing_token=fencing_token, open_timeout_s=open_timeout_s)
        #: What was seen is known to all that work at this execution, and lies in the ledger.
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
        """Do as Database does; temporary tables go with their connection."""
        was_committed = super().reconnect(failure)
        if was_committed is not None:
            # The server may go away again.
            self.retry_on_disconnect(self._recreate_pass_tables)
        return was_committed

    def begin_pass(self, selection: RequestSelection | None = None) -> None:
        """Begin to read the input from its start: no request was seen yet."""
        self._selection = selection or RequestSelection()
        self._has_joined_pass = False
        self._db.clear_table("seen")
        self._db.clear_table("strangers")

    def join_pass(self, selection: RequestSelection) -> None:
        """Take part in a pass that another process has begun, with the same wish."""
        self._selection = selection
        self._has_joined_pass = True

    def preview(self, requests: Iterable[RowRequest]) -> None:
        """See the requests of a batch; decide about those not seen before in this pass."""
        with self._temporary_transaction():
            self._load_batch(requests)
            self._db.execute(
                "INSERT INTO strangers (fingerprint) SELECT fingerprint FROM batch WHERE i NOT IN (SELECT i FROM asks) "
                "ORDER BY i"
            )
            self._match_batch(_UNKNOWN_REQUESTS)
            self._record_seen()

    def enroll(self, call: Call, requests: Iterable[RowRequest]) -> None:
        """See the requests of a batch, making those that are new; `mark` puts what is wanted into the queue."""
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
                # Who enrolls the same at the same time does it in the same order, and nobody waits in a circle.
                [
                    (name, call_id, params[name])
                    for name in (sorted(new_fingerprints) if self._pass_is_shared else new_fingerprints)
                ],
            )
            self._match_batch(_KNOWN_REQUESTS)
        self._record_seen()
        # What was purged is known by its name alone until it is to be asked again.
        purged = self._db.execute(
            "SELECT fingerprint, id FROM requests WHERE erased_ms IS NOT NULL "
            f"AND id IN (SELECT id FROM asks JOIN seen USING (id) WHERE {_TO_SEND})"
        ).fetchall()
        self._db.executemany(
            "UPDATE requests SET params = ?, erased_ms = NULL WHERE id = ?",
            [(params[name], number) for name, number in purged],
        )

    def apply_limits(self) -> None:
        """Leave out what the wish leaves out, now that the whole input was seen: caps, then sample, then limit."""
        with self._temporary_transaction():
            self._apply_limits(self._selection)

    def _apply_limits(self, selection: RequestSelection) -> None:
        if selection.max_per_group is not None:
            # What was asked before counts first.
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
        """Put what is wanted into the queue; a lead that left the file is forgotten there, and never paid for.

        The mark is a place in the queue; it ends with the execution, and so does the person's word. What is
        at the API is marked, too: when it fails at no charge, it is asked again. Where the person said how
        many are asked at most, that holds only for what this wish has asked itself.
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
        """Settle what is in doubt as failed (edge f, by the person's word), of all that was seen in this pass.

        Its attempt stays in doubt on record.
        """
        accepted = self._db.execute(
            "UPDATE requests SET state = 'failed' WHERE state = 'in_doubt' AND id IN (SELECT id FROM seen)"
        ).rowcount
        self._db.execute("UPDATE seen SET decision = 'failed' WHERE decision = 'in_doubt'")
        return accepted

    def decision_counts(self) -> dict[Decision, int]:
        """Count the distinct requests of this pass by what was decided about them."""
        rows = self._db.execute("SELECT decision, count(*) FROM seen GROUP BY 1")
        return {Decision(decision): count for decision, count in rows}

    def oldest_answer_ms(self) -> int | None:
        """Tell when the oldest answer came (ms) that is used again in this pass; None: there is none."""
        (oldest_ms,) = self._db.execute(
            "SELECT min(a.settled_ms) FROM seen s JOIN requests r ON r.id = s.id "
            "JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) WHERE s.decision IN ('found', 'not_found')"
        ).fetchone()
        return None if oldest_ms is None else int(oldest_ms)

    def row_decisions(self, requests: Iterable[RowRequest]) -> Iterator[RowDecision]:
        """Tell what was decided about each row of a batch, now that the whole input was seen."""
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
        """Count the distinct requests of this pass by their state; those in the queue are pending."""
        rows = self._db.execute(
            "SELECT CASE WHEN r.position IS NOT NULL AND r.state NOT IN ('submitting', 'submitted') "
            "THEN 'pending' ELSE r.state END, count(*) "
            "FROM seen s JOIN requests r ON r.id = s.id GROUP BY 1"
        )
        return {State(state): count for state, count in rows}

    def queued_count(self) -> int:
        """Count what may be asked yet."""
        (count,) = self._db.execute(f"SELECT count(*) FROM requests WHERE {QUEUED}").fetchone()
        return int(count)

    def request_results(self, requests: Iterable[RowRequest]) -> list[RequestResult]:
        """Tell what is known of each request of a batch; one never enrolled is left out, unless it is capped."""
        if self._has_joined_pass:
            self._load_batch(requests)  # all of it was seen, and others may be looking
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
        """Make one commit of it for who only looks, and has no transaction."""
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
        """Load the distinct questions of a batch, and find the requests that they are; return their params."""
        rows = list(requests)
        # Of rows that ask the same, the first in the input says whose group, the first in the order of asking when.
        distinct = {row.fingerprint: row for row in reversed(rows)}
        first = list(reversed(distinct.values()))
        self._db.clear_table("batch")
        self._db.clear_table("asks")
        # A fifth of the time that a row at a time would take.
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
        # A stranger remains one in this pass, though somebody else may enroll it meanwhile.
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
        """Write what is decided about a request before the whole input was seen."""
        selection = self._selection
        newest = "EXISTS (SELECT 1 FROM attempts a WHERE a.id = r.attempt_id AND {})".format
        cases: dict[str, Decision] = {}
        if selection.after_execution is not None:
            settled = newest(
                f"a.settled_in > {selection.after_execution:d} AND a.execution_id <= {selection.after_execution:d}"
            )
            # What waited when the plan was made is none of those that it said would be asked.
            cases[f"r.state = 'pending' AND {settled}"] = Decision.WAITING
            cases[f"r.state <> 'pending' AND {newest(f'a.execution_id > {selection.after_execution:d}')}"] = (
                Decision.PLANNED
            )
            cases |= {f"r.state = '{state}' AND {settled}": Decision(state.value) for state in selection.retry}
        cases["r.state IS NULL OR r.state = 'pending'"] = Decision.NEW
        if selection.no_active_run:
            # The next execution begins with putting it in doubt.
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
    """Choose `sample` of the numbers below `count`: one at random of each of as many equal stretches."""
    sample = min(sample, count)
    rng = random.Random(seed)  # noqa: S311 - a sample is no secret
    stratum_bounds = [number * count // sample for number in range(sample + 1)] if sample else []
    return [rng.randrange(low, high) for low, high in pairwise(stratum_bounds)]
