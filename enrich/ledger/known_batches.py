"""Keeps the ids of the requests of each batch that a run has read, so that equal rows are not computed again."""

from __future__ import annotations

from hashlib import blake2b

from enrich.ledger.database import Database


def find(db: Database, job: str, position: int, digest: bytes) -> str | None:
    """Return what was stored (JSON) for the batch at a position of a job's input.

    None: nothing, the batch has another digest now, or the content is damaged. It can be computed again.
    """
    with db.temporary_transaction():
        row = db.execute(
            "SELECT content, digest FROM known_batches WHERE job = ? AND position = ?", (job, position)
        ).fetchone()
    return row[0] if row is not None and row[1] == _with_content(digest, row[0]) else None


def store(db: Database, job: str, rows: range, digest: bytes, content: str) -> None:
    """Store what is known (JSON) of the batch with these rows, instead of batches that begin in it."""
    in_it = (job, rows.start, rows.stop)
    db.execute("DELETE FROM known_batches WHERE job = ? AND position >= ? AND position < ?", in_it)
    stored = (job, rows.start, _with_content(digest, content), content)
    db.execute("INSERT INTO known_batches VALUES (?, ?, ?, ?)", stored)


def _with_content(digest: bytes, content: str) -> bytes:
    """Return the digest of a batch together with what is stored of it."""
    return blake2b(content.encode(errors="replace"), digest_size=16, key=digest).digest()
