"""What the change feed of a job has delivered: for each value the attempt whose answer has it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct

from enrich.ledger.database import Database


class Delivery(Struct, frozen=True, gc=False):
    """Where a value of the feed came from: the attempt, and the path in its answer."""

    attempt_id: int
    path: str


def begin_feed(db: Database) -> None:
    """Prepare for the rows of a new feed."""
    blob = db.dialect.blob_type
    db.execute(f"CREATE TEMP TABLE IF NOT EXISTS feed_rows (position BIGINT PRIMARY KEY, row_key {blob})")
    db.execute(f"CREATE TEMP TABLE IF NOT EXISTS feed_keys (row_key {blob} PRIMARY KEY, position BIGINT)")
    db.execute("CREATE TEMP TABLE IF NOT EXISTS feed_attempts (id BIGINT PRIMARY KEY)")
    db.session.clear_table("feed_keys")


def begin_batch(db: Database, rows: Collection[tuple[int, bytes]]) -> set[int]:
    """Take the rows (position, key) of the next batch. Return those whose key an earlier row of the feed has."""
    db.session.clear_table("feed_rows")
    db.executemany("INSERT INTO feed_rows VALUES (?, ?)", rows)
    first_rows = db.execute(
        "INSERT INTO feed_keys SELECT row_key, min(position) FROM feed_rows GROUP BY row_key "
        "ON CONFLICT DO NOTHING RETURNING position"
    )
    return {position for position, _ in rows}.difference(position for (position,) in first_rows.fetchall())


def replace_keys(db: Database, rows: Iterable[tuple[int, bytes]]) -> None:
    """Give rows (position, key) of the batch another key."""
    db.executemany("UPDATE feed_rows SET row_key = ? WHERE position = ?", ((key, position) for position, key in rows))


def delivered_values(db: Database, job: str) -> dict[tuple[int, str], Delivery]:
    """Return what a job's feed has delivered of the batch, by position and field."""
    rows = db.execute(
        "SELECT t.position, d.field, d.attempt_id, d.path FROM feed_rows t CROSS JOIN delivered d WHERE d.job = ? "
        "AND d.row_key = t.row_key",
        (job,),
    )
    return {(position, field): Delivery(attempt, path) for position, field, attempt, path in rows.fetchall()}


def answers(db: Database, attempts: Collection[int]) -> Mapping[int, str | None]:
    """Return the answers of attempts. None: it was erased."""
    if not attempts:
        return {}
    db.session.clear_table("feed_attempts")
    db.executemany("INSERT INTO feed_attempts VALUES (?)", ((attempt,) for attempt in attempts))
    return dict(
        db.execute("SELECT a.id, a.answer FROM feed_attempts t CROSS JOIN attempts a WHERE a.id = t.id").fetchall()
    )


def mark_delivered(db: Database, job: str, values: Sequence[tuple[bytes, str, Delivery]]) -> None:
    """Record what a job's feed has delivered: row key, field, and where the value came from."""
    db.executemany(
        "INSERT INTO delivered VALUES (?, ?, ?, ?, ?) ON CONFLICT (job, row_key, field) DO UPDATE "
        "SET attempt_id = excluded.attempt_id, path = excluded.path",
        ((job, key, field, delivery.attempt_id, delivery.path) for key, field, delivery in values),
    )
