"""Erases lookups from a state file of the sandbox: what was asked and answered. Tasks, counts and costs stay."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple


class StoredLookup(NamedTuple):
    """A lookup: its params and the `data` of its answers (JSON), and when it was last sent (epoch seconds)."""

    id: int
    params: str
    answers: list[str]
    last_sent_at: float


def read_lookups(state: Path) -> list[StoredLookup]:
    """Return the lookups that were not erased. Raises sqlite3.Error when another process uses the file."""
    with _open(state) as db:
        answers: dict[int, list[str]] = {}
        for question, data in db.execute("SELECT question, data FROM runs"):
            answers.setdefault(question, []).append(data)
        rows = db.execute(
            "SELECT questions.id, params, max(tasks.created) FROM questions JOIN runs ON question = questions.id"
            " JOIN tasks ON tasks.id = task WHERE params <> '{}' GROUP BY 1"
        )
        return [StoredLookup(number, params, answers[number], last_sent_at) for number, params, last_sent_at in rows]


def erase_lookups(state: Path, ids: Iterable[int]) -> None:
    """Erase params and answers, also from free pages and the journal. Raises sqlite3.Error as `read_lookups` does."""
    numbers = [(number,) for number in ids]
    with _open(state) as db:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("BEGIN IMMEDIATE")
        # The key is a hash of the params, which could be guessed.
        db.executemany("UPDATE questions SET params = '{}', key = randomblob(16) WHERE id = ?", numbers)
        db.executemany("UPDATE runs SET data = 'null', error = '' WHERE question = ?", numbers)
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


@contextmanager
def _open(state: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(state, isolation_level=None, timeout=0.2)) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        yield db
