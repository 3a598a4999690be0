"""Keeps the ids of the requests of each batch that a run has read, so that equal rows are not computed again."""

from __future__ import annotations

from enrich.ledger.database import Database


def find(db: Database, job: str, position: int, digest: bytes) -> str | None:
    """Return what was stored (JSON) for the batch at a position of a job's input; None: nothing, or it has changed."""
    with db.temporary_transaction():
        row = db.execute(
            "SELECT content FROM known_batches WHERE job = ? AND position = ? AND digest = ?", (job, position, digest)
        ).fetchone()
    return None if row is None else str(row[0])


def store(db: Database, job: str, rows: range, digest: bytes, content: str) -> None:
    """Store what is known (JSON) of the batch with these rows, instead of batches that begin in it."""
    in_it = (job, rows.start, rows.stop)
    db.execute("DELETE FROM known_batches WHERE job = ? AND position >= ? AND position < ?", in_it)
    db.execute("INSERT INTO known_batches VALUES (?, ?, ?, ?)", (job, rows.start, digest, content))
