"""What the change feed of a job has delivered: for each value the attempt whose answer has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from enrich.ledger.database import Database
from enrich.ledger.request_ids import FINGERPRINT, as_list


class Delivery(Struct, frozen=True, gc=False):
    """Where a value of the feed came from: the attempt, and the path in its answer."""

    attempt_id: int
    path: str


def begin_feed(db: Database) -> None:
    """Prepare for the rows of a new feed."""
    db.execute(
        f"CREATE TEMP TABLE IF NOT EXISTS feed_keys (row_key {db.dialect.blob_type} PRIMARY KEY, row_index BIGINT)"
    )
    db.session.clear_table("feed_keys")


def repeated_rows(db: Database, keys: Mapping[int, bytes]) -> set[int]:
    """Take the keys of the rows of the next batch. Return the rows whose key an earlier row of the feed has."""
    first_rows = db.execute(
        f"INSERT INTO feed_keys SELECT {FINGERPRINT}, min(CAST(value AS BIGINT)) FROM json_each(CAST(?1 AS TEXT)) "
        "GROUP BY 1 ON CONFLICT DO NOTHING RETURNING row_index",
        as_list(keys.values(), keys),
    )
    return keys.keys() - {row for (row,) in first_rows.fetchall()}


def delivered_values(db: Database, job: str, keys: Mapping[int, bytes]) -> dict[tuple[int, str], Delivery]:
    """Return what a job's feed has delivered for rows with these keys, by row and field."""
    found = db.execute(
        "SELECT CAST(b.value AS BIGINT), d.field, d.attempt_id, d.path FROM json_each(CAST(?1 AS TEXT)) b "
        f"CROSS JOIN delivered d WHERE d.job = ?3 AND d.row_key = {FINGERPRINT}",
        (*as_list(keys.values(), keys), job),
    )
    return {(row, field): Delivery(attempt, path) for row, field, attempt, path in found.fetchall()}


def mark_delivered(db: Database, job: str, values: Sequence[tuple[bytes, str, Delivery]]) -> None:
    """Record what a job's feed has delivered: row key, field, and where the value came from."""
    db.executemany(
        "INSERT INTO delivered VALUES (?, ?, ?, ?, ?) ON CONFLICT (job, row_key, field) DO UPDATE "
        "SET attempt_id = excluded.attempt_id, path = excluded.path",
        ((job, key, field, delivery.attempt_id, delivery.path) for key, field, delivery in values),
    )
