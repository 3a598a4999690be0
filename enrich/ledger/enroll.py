"""Joins the input with the ledger: finds each row's request and decides which requests a run sends.

A pass reads the input once, batch by batch. Its state is in temporary tables, so that `enrich plan` decides with the
same statements as a run, over a ledger that is opened read-only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, repeat
from operator import itemgetter
from typing import NamedTuple

import msgspec

from enrich.job.target import Target
from enrich.json_text import to_json_text
from enrich.ledger import decisions, queries
from enrich.ledger.database import Database
from enrich.ledger.decisions import decision_sql
from enrich.ledger.dialect import MAX_ROWS, RESULT_PRICE
from enrich.ledger.queue import TO_SEND
from enrich.models import (
    COUNTED_TOWARDS_LIMIT,
    Decision,
    RequestBatch,
    RequestResult,
    RequestSelection,
    ResultColumns,
    State,
)

_COUNTED_TOWARDS_LIMIT = f"decision IN ({', '.join(repr(decision.value) for decision in COUNTED_TOWARDS_LIMIT)})"

#: As `decisions.BATCH`, for one request with its place in the send order and its group.
_ONE_REQUEST = (
    "(SELECT CAST(? AS BIGINT) AS id, CAST(? AS BIGINT) AS position, CAST(? AS BIGINT) AS queue_position, "
    "CAST(? AS TEXT) AS group_name) AS b"
)
#: What a RequestResult has in its fields, but for the answer.
_RESULT_FIELDS = {
    "position": "b.position",
    "first": "CAST(s.first_position = b.position AS INTEGER)",
    "state": "CASE WHEN r.answer_id IS NULL THEN coalesce(r.state, 'pending') ELSE a.state END",
    "error": "a.error",
    "provider": "a.provider",
    "credits": RESULT_PRICE,
    "task_id": "a.task_id",
    "settled_ms": "a.settled_ms",
    "attempt_id": "a.id",
    "capped": "CAST(s.decision = 'capped' AS INTEGER)",
    "erased_ms": "a.erased_ms",
}

# A request that is not in the ledger goes here and gets a negative id.
_UNKNOWN_TABLE = "CREATE TEMP TABLE IF NOT EXISTS unknown_requests (id {serial}, fingerprint {blob} NOT NULL UNIQUE)"
# The key is the id, not the fingerprint: the requests of a file are in the ledger nearly in the file's order.
_SEEN_TABLE = """CREATE TEMP TABLE IF NOT EXISTS seen (id {serial}, first_position BIGINT NOT NULL,
queue_position BIGINT NOT NULL, group_name TEXT, decision TEXT NOT NULL)"""


class RowDecision(NamedTuple):
    """The decision about a row. `first_position` is the first row with the same request.

    `settled_ms` is when the request was answered (milliseconds since 1970, UTC), None if it was not.
    """

    position: int
    first_position: int
    decision: Decision
    settled_ms: int | None


def begin_pass(db: Database) -> None:
    """Start reading the input from its beginning. No request has been seen yet."""
    db.matched_up_to = 0
    with db.temporary_transaction():
        _ensure_pass_tables(db)
        db.session.clear_table("seen")
        db.session.clear_table("unknown_requests")


def _ensure_pass_tables(db: Database) -> None:
    """Create the temporary tables of a pass, unless this connection has them. They end with the connection."""
    for statement in (_UNKNOWN_TABLE,) if db.shares_passes else (_UNKNOWN_TABLE, _SEEN_TABLE):
        db.execute(statement.format(blob=db.dialect.blob_type, serial=db.dialect.serial_key))


def preview(db: Database, requests: RequestBatch, selection: RequestSelection) -> tuple[str, int]:
    """Read the requests of a batch and decide about those new to this pass. Leaves the ledger unchanged.

    Returns the `batch_parameters` of the distinct requests. Those not in the ledger have negative ids.
    """
    batch = requests.distinct()
    with db.temporary_transaction():
        _ensure_pass_tables(db)
        ids = decisions.find_ids(db, batch)
        if unknown := decisions.without_id(batch.fingerprints, ids):
            db.execute(
                f"INSERT INTO unknown_requests (fingerprint) SELECT {decisions.FINGERPRINT} "
                "FROM json_each(CAST(?1 AS TEXT)) WHERE true ORDER BY key",
                decisions.as_list(unknown),
            )
            ids = decisions.add_ids(ids, batch.fingerprints, decisions.unknown_ids(db, unknown))
        return _record_seen(db, batch, ids, selection)


def enroll(db: Database, target: Target, requests: RequestBatch, selection: RequestSelection) -> Sequence[int | None]:
    """Read the requests of a batch and insert the new ones. `fill_queue` queues the selected ones afterwards.

    Returns the ids of the requests.
    """
    batch = requests.distinct()
    _ensure_pass_tables(db)
    ids = decisions.find_ids(db, batch)
    if new := decisions.without_id(batch.fingerprints, ids):
        canonical = target.canonical()
        db.execute("INSERT INTO calls (canonical) VALUES (?) ON CONFLICT DO NOTHING", (canonical,))
        call_id = db.value("SELECT id FROM calls WHERE canonical = ?", canonical)
        if db.shares_passes:
            # Processes that enroll the same requests at once insert them in the same order: no deadlocks.
            new.sort()
        params = dict(zip(batch.fingerprints, batch.params, strict=True))
        db.execute(
            "INSERT INTO requests (fingerprint, call_id, params, state) "
            f"SELECT {decisions.FINGERPRINT}, ?3, value->>0, 'pending' "
            "FROM json_each(CAST(?1 AS TEXT)) WHERE true ORDER BY key ON CONFLICT DO NOTHING",
            (to_json_text([[params[name]] for name in new]), b"".join(new), call_id),
        )
        ids = decisions.add_ids(ids, batch.fingerprints, decisions.ids_in(db, "requests", new))
    chosen = _record_seen(db, batch, ids, selection)
    if db.exists("FROM requests WHERE erased_ms IS NOT NULL"):
        _restore_params(db, batch, ids, chosen)
    if batch is requests or requests.ids is not None:
        return ids if requests.ids is None else requests.ids
    by_fingerprint = dict(zip(batch.fingerprints, ids, strict=True))
    return [by_fingerprint[name] for name in requests.fingerprints]


def _restore_params(db: Database, batch: RequestBatch, ids: Sequence[int | None], chosen: tuple[str, int]) -> None:
    """Restore the params of purged requests that are to be sent again."""
    purged = db.execute(
        f"SELECT r.id FROM {decisions.BATCH} CROSS JOIN seen s CROSS JOIN requests r "
        f"WHERE s.id = b.id AND r.id = s.id AND s.{TO_SEND} AND r.erased_ms IS NOT NULL",
        chosen,
    ).fetchall()
    if purged and batch.complete is not None:
        batch = batch.complete().distinct()
    params = dict(zip(ids, batch.params, strict=True)) if purged else {}
    db.executemany(
        "UPDATE requests SET params = ?, erased_ms = NULL WHERE id = ?",
        [(params[number], number) for (number,) in purged],
    )


def apply_limits(db: Database, selection: RequestSelection) -> None:
    """Exclude requests once the whole input was read: by per-group limit, then sample, then limit."""
    with db.temporary_transaction():
        if selection.max_per_group is not None:
            # Requests sent before count towards the limit first.
            _exclude(
                db,
                Decision.CAPPED,
                "SELECT id FROM (SELECT id, decision, row_number() OVER "
                "(PARTITION BY group_name ORDER BY decision = 'new', queue_position) AS number "
                "FROM seen WHERE group_name IS NOT NULL) AS grouped WHERE decision = 'new' AND number > ?",
                min(selection.max_per_group, MAX_ROWS),
            )
        if selection.sample is not None:
            count = db.value(f"SELECT count(*) FROM seen WHERE {_COUNTED_TOWARDS_LIMIT}")
            db.execute("CREATE TEMP TABLE sampled (number BIGINT PRIMARY KEY)")
            numbers = stratified_sample(count, selection.sample, selection.seed)
            db.executemany("INSERT INTO sampled VALUES (?)", ((number,) for number in numbers))
            _exclude(
                db,
                Decision.NOT_SAMPLED,
                "SELECT id FROM (SELECT id, row_number() OVER (ORDER BY first_position) - 1 AS number "
                f"FROM seen WHERE {_COUNTED_TOWARDS_LIMIT}) AS counted "
                "WHERE NOT EXISTS (SELECT 1 FROM sampled WHERE sampled.number = counted.number)",
            )
            db.execute("DROP TABLE sampled")
        if selection.limit is not None:
            _exclude(
                db,
                Decision.OVER_LIMIT,
                f"SELECT id FROM seen WHERE {_COUNTED_TOWARDS_LIMIT} "
                f"ORDER BY decision <> 'planned', queue_position LIMIT {MAX_ROWS} OFFSET ?",
                min(selection.limit, MAX_ROWS),
            )


def accept_in_doubt_as_failed(db: Database, sent_in: int | None = None) -> int:
    """Mark unconfirmed requests of this pass, but those sent in `sent_in`, as failed (edge f). Return how many."""
    # Their attempts stay `in_doubt` on record.
    accepted = db.execute(
        "UPDATE requests SET state = 'failed' WHERE state = 'in_doubt' AND id IN (SELECT id FROM seen) "
        "AND attempt_id NOT IN (SELECT id FROM attempts WHERE execution_id = CAST(? AS BIGINT))",
        (sent_in,),
    ).rowcount
    failed_ids = "(SELECT id FROM requests WHERE state = 'failed')"
    db.execute(f"UPDATE seen SET decision = 'failed' WHERE decision = 'in_doubt' AND id IN {failed_ids}")
    return accepted


def decision_counts(db: Database) -> dict[Decision, int]:
    """Count the distinct requests of this pass by decision."""
    return {Decision(name): count for name, count in queries.count_by_state(db, "decision", "seen").items()}


def oldest_answer_ms(db: Database) -> int | None:
    """Return when the oldest answer reused in this pass was settled (ms). None: no answer is reused."""
    oldest_ms = db.value(
        "SELECT min(a.settled_ms) FROM seen s JOIN requests r ON r.id = s.id "
        "JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) WHERE s.decision IN ('found', 'not_found')"
    )
    return None if oldest_ms is None else int(oldest_ms)


def row_decisions(db: Database, requests: RequestBatch) -> Iterator[RowDecision]:
    """Yield the decision for each row of a batch. Call it after the whole input was read."""
    batch = requests.distinct()
    with db.temporary_transaction():
        _ensure_pass_tables(db)
        ids = decisions.find_ids(db, batch)
        found = db.execute(
            f"SELECT b.position, s.first_position, s.decision, a.settled_ms FROM {decisions.BATCH} "
            "CROSS JOIN seen s LEFT JOIN requests r ON r.id = b.id "
            "LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) WHERE s.id = b.id",
            decisions.batch_parameters(batch, ids),
        )
        known = {position: (first, Decision(decision), settled_ms) for position, first, decision, settled_ms in found}
    first_rows = dict(zip(batch.fingerprints, batch.positions, strict=True))
    for position, name in zip(requests.positions, requests.fingerprints, strict=True):
        if first_rows[name] in known:
            yield RowDecision(position, *known[first_rows[name]])


def enrolled_counts(db: Database) -> Counter[State]:
    """Count the distinct requests of this pass by state. Queued requests count as pending."""
    state = (
        "CASE WHEN r.queue_position IS NOT NULL AND r.state NOT IN ('submitting', 'submitted') "
        "THEN 'pending' ELSE r.state END"
    )
    counts = queries.count_by_state(db, state, "seen s JOIN requests r ON r.id = s.id")
    return Counter({State(name): count for name, count in counts.items()})


def request_results(db: Database, requests: RequestBatch, selection: RequestSelection | None = None) -> ResultColumns:
    """Return the result of each request of a batch. Leave out those never enrolled, unless they are capped.

    `selection` decides about requests that are new to this pass. None: the pass has seen all requests, and other
    processes may be reading `seen`.
    """
    batch = requests.distinct()
    with db.temporary_transaction():
        _ensure_pass_tables(db)
        if selection is None:
            chosen = decisions.batch_parameters(batch, decisions.find_ids(db, batch))
        else:
            chosen = preview(db, batch, selection)
        # The database makes the columns: a list for each row takes twice as long.
        lists = ", ".join(map(db.dialect.json_list.format, _RESULT_FIELDS.values()))
        columns = db.execute(
            f"SELECT {lists} FROM {decisions.BATCH} CROSS JOIN seen s "
            "LEFT JOIN requests r ON r.id = b.id LEFT JOIN attempts a ON a.id = coalesce(r.answer_id, r.attempt_id) "
            "WHERE s.id = b.id AND (b.id > 0 OR s.decision = 'capped')",
            chosen,
        ).fetchone()
        found = dict(zip(_RESULT_FIELDS, map(msgspec.json.decode, columns), strict=True))
        # Not as one list: a batch of long answers would be larger than a database can return as one value.
        answers = queries.answers(db, filter(None, found["attempt_id"]))
    found["answer"] = list(map(answers.get, found["attempt_id"]))
    return {name: found[name] for name in RequestResult._fields}


def _record_seen(
    db: Database, batch: RequestBatch, ids: Sequence[int | None], selection: RequestSelection
) -> tuple[str, int]:
    """Decide about the requests that are new to this pass. For the others, record a lower position.

    Returns the `batch_parameters` of all of them.
    """
    chosen = decisions.batch_parameters(batch, ids)
    # Batches may come in any order. Processes that share a pass insert in the same order: no deadlocks.
    in_order = "ORDER BY b.id" if db.shares_passes else ""
    decided = (
        f"{decision_sql(selection)} FROM {{}} LEFT JOIN requests r ON r.id = b.id WHERE true {in_order} "
        "ON CONFLICT (id) DO UPDATE SET "
        "queue_position = CASE WHEN excluded.queue_position < seen.queue_position THEN excluded.queue_position "
        "ELSE seen.queue_position END, "
        "group_name = CASE WHEN excluded.first_position < seen.first_position THEN excluded.group_name "
        "ELSE seen.group_name END, "
        "first_position = CASE WHEN excluded.first_position < seen.first_position THEN excluded.first_position "
        "ELSE seen.first_position END "
        "WHERE excluded.queue_position < seen.queue_position OR excluded.first_position < seen.first_position"
    )
    if batch.queue_positions is None and batch.groups is None:
        select = "INSERT INTO seen SELECT b.id, b.position, b.position, NULL, "
        db.execute(select + decided.format(decisions.BATCH), chosen)
        return chosen
    rows = zip(
        ids, batch.positions, batch.queue_positions or batch.positions, batch.groups or repeat(None), strict=False
    )
    select = "INSERT INTO seen SELECT b.id, b.position, b.queue_position, b.group_name, "
    db.executemany(select + decided.format(_ONE_REQUEST), sorted(rows, key=itemgetter(0)))
    return chosen


def _exclude(db: Database, decision: Decision, which: str, *values: object) -> None:
    db.execute(f"UPDATE seen SET decision = '{decision}' WHERE id IN ({which})", values)


def stratified_sample(count: int, sample: int, seed: int) -> list[int]:
    """Choose `sample` of the numbers below `count`: one random number from each of `sample` equal ranges."""
    sample = min(sample, count)
    rng = random.Random(seed)  # noqa: S311 - sampling needs no cryptographic randomness
    stratum_bounds = [number * count // sample for number in range(sample + 1)] if sample else []
    return [rng.randrange(low, high) for low, high in pairwise(stratum_bounds)]
