"""Which rows a job's feed of changes has delivered."""

from __future__ import annotations

from collections.abc import Iterable

from enrich.ledger.database import Database


def undelivered_rows(
    db: Database, job: str, feed_rows: Iterable[tuple[int, bytes, int]]
) -> list[tuple[int, str | None]]:
    """Return the rows whose attempt is not in a job's feed yet: index, and the answer delivered before, if any.

    `feed_rows` are (index, row key, attempt).
    """
    db.execute(
        "CREATE TEMP TABLE IF NOT EXISTS feed_rows "
        f"(position BIGINT PRIMARY KEY, row_key {db.dialect.blob_type}, attempt_id BIGINT)"
    )
    db.session.clear_table("feed_rows")
    db.executemany("INSERT INTO feed_rows VALUES (?, ?, ?)", feed_rows)
    return db.execute(
        "SELECT t.position, a.answer FROM feed_rows t LEFT JOIN delivered d ON d.job = ? AND d.row_key = t.row_key "
        "LEFT JOIN attempts a ON a.id = d.attempt_id WHERE d.attempt_id IS DISTINCT FROM t.attempt_id ORDER BY "
        "t.position",
        (job,),
    ).fetchall()


def mark_delivered(db: Database, job: str, feed_rows: Iterable[tuple[int, bytes, int]]) -> None:
    """Record what a job's feed has delivered."""
    db.executemany(
        "INSERT INTO delivered VALUES (?, ?, ?) ON CONFLICT (job, row_key) DO UPDATE "
        "SET attempt_id = excluded.attempt_id",
        ((job, key, attempt) for _, key, attempt in feed_rows),
    )
