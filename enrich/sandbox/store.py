"""Keeps tasks, runs and credits in one SQLite file; all SQL is here.

A task has a task id of the API, and one run (single) or many (bulk). A run is one paid lookup. It reserves its maximum
cost, and is settled at its true cost, or refunded when its task is canceled before.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# "sbox" in ASCII, and the schema version; a file with other values is not a sandbox state.
_APPLICATION_ID = 0x73626F78
_VERSION = 3

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value REAL NOT NULL) STRICT;
CREATE TABLE lookups (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    target TEXT NOT NULL,
    params TEXT NOT NULL,
    requested INTEGER NOT NULL
) STRICT;
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    bulk INTEGER NOT NULL,
    created REAL NOT NULL,
    fault TEXT NOT NULL,
    fault_param REAL NOT NULL,
    cancelled REAL
) STRICT;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES tasks,
    lookup INTEGER NOT NULL REFERENCES lookups,
    ready REAL NOT NULL,
    outcome TEXT NOT NULL,
    data TEXT NOT NULL,
    error TEXT NOT NULL,
    reserved INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'settled', 'refunded'))
) STRICT;
CREATE INDEX runs_of_task ON runs (task);
CREATE INDEX runs_of_lookup ON runs (lookup);
CREATE INDEX runs_running ON runs (ready) WHERE state = 'running';
-- The providers requested in a run: a JSON list of [name, found, millionths].
CREATE TABLE steps (run INTEGER PRIMARY KEY REFERENCES runs, providers TEXT NOT NULL) STRICT;
-- A running run counts as charged: it will be, unless it is cancelled or fails free of charge.
CREATE VIEW bought AS SELECT
    lookup,
    task,
    cost * (state = 'settled') AS spent,
    state <> 'refunded' AND NOT (state = 'settled' AND outcome = 'free') AS charged
FROM runs;
"""


class TaskFault(NamedTuple):
    """A task's fault of moment "task", and its param; an empty name: no fault."""

    name: str
    param: float


class Run(NamedTuple):
    """One paid lookup of a task, with its answer; `ready` in seconds since the epoch, amounts in millionths."""

    ready: float
    outcome: str
    data: str
    error: str
    reserved: int
    cost: int
    state: str
    lookup: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task with its runs, in the order of the request; times in seconds since the epoch."""

    id: int
    task_id: str
    bulk: bool
    created: float
    fault: TaskFault
    cancelled: float | None
    runs: list[Run]


class SandboxStore:
    """The state file. `spent` and `reserved` are totals in millionths, updated with each change of the runs.

    `facts` has `balance_at_start` and `topped_up` in millionths, `offset` (the seconds by which the clock was moved),
    and the changed prices in credits as `price:ID`.
    """

    def __init__(self, path: Path, balance: int) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        # One thread at a time uses the connection: `serve_in_thread` opens it, then only the server's thread uses it.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.2)
        try:
            self._open(path, balance)
        except BaseException:
            self._db.close()
            raise

    def _open(self, path: Path, balance: int) -> None:
        # Exclusive: two sandboxes on one file would keep separate totals.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        new = self._one("SELECT count(*) FROM sqlite_master")[0] == 0
        version_found = (self._one("PRAGMA application_id")[0], self._one("PRAGMA user_version")[0])
        if not new and version_found != (_APPLICATION_ID, _VERSION):
            raise ValueError("it is not the state of a sandbox of this version")
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode = WAL")
        # Without syncs, only a crash of the machine can lose commits.
        self._db.execute("PRAGMA synchronous = OFF")
        if new:
            marks = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_VERSION};"
            self._db.executescript(f"BEGIN; {_SCHEMA} {marks}")
            start = "INSERT INTO facts VALUES ('balance_at_start', ?), ('topped_up', 0), ('offset', 0)"
            self._db.execute(start, [balance])
            self._db.execute("COMMIT")
        self.facts: dict[str, float] = dict(self._db.execute("SELECT name, value FROM facts"))
        self.reserved, self.spent = map(
            int,
            self._one(
                "SELECT total(reserved) FILTER (WHERE state = 'running'), total(cost) FILTER (WHERE state = 'settled')"
                " FROM runs"
            ),
        )

    def close(self) -> None:
        """Close the file; all accepted runs are stored."""
        self._db.close()

    @property
    def balance(self) -> int:
        """Available credits, in millionths: not spent and not reserved."""
        return int(self.facts["balance_at_start"] + self.facts["topped_up"]) - self.spent - self.reserved

    @property
    def prices(self) -> dict[int, float]:
        """The changed prices, in credits, by the ids of providers, verifiers and enrichments."""
        return {int(name.removeprefix("price:")): self.facts[name] for name in self.facts if name.startswith("price:")}

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """Begin a transaction; it commits at the end of the block, or rolls back on an error."""
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def set_fact(self, name: str, value: float) -> None:
        """Store a value of `facts`."""
        self.facts[name] = value
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [name, value])

    def count_lookup(self, key: bytes, canonical: tuple[str, str]) -> tuple[int, int]:
        """Count one more request for a lookup. Returns its id, and how often it was requested so far."""
        number, count = self._one(
            "INSERT INTO lookups (key, target, params, requested)"
            " VALUES (?, ?, ?, 1) ON CONFLICT (key) DO UPDATE SET requested = requested + 1 RETURNING id, requested",
            [key, *canonical],
        )
        return number, count

    def add_task(
        self, task_id: str, runs: Iterable[tuple[Run, str]], fault: TaskFault, *, bulk: bool, now: float
    ) -> None:
        """Store a task with its runs, each with its steps (JSON), and reserve their maximum costs."""
        task = self._db.execute(
            "INSERT INTO tasks (task_id, bulk, created, fault, fault_param) VALUES (?, ?, ?, ?, ?)",
            [task_id, bulk, now, *fault],
        ).lastrowid
        for run, steps in runs:
            number = self._db.execute(
                "INSERT INTO runs (ready, outcome, data, error, reserved, cost, state, lookup, task)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [*run, task],
            ).lastrowid
            self._db.execute("INSERT INTO steps VALUES (?, ?)", [number, steps])
            self.reserved += run.reserved

    def task(self, task_id: str) -> Task | None:
        """Return a task with its runs; None when there is none."""
        rows = self._db.execute(
            "SELECT tasks.id, bulk, created, fault, fault_param, cancelled,"
            " ready, outcome, data, error, reserved, cost, state, lookup"
            " FROM tasks JOIN runs ON runs.task = tasks.id WHERE task_id = ? ORDER BY runs.id",
            [task_id],
        ).fetchall()
        if not rows:
            return None
        number, bulk, created, name, param, cancelled = rows[0][:6]
        runs = [Run(*row[6:]) for row in rows]
        return Task(number, task_id, bool(bulk), created, TaskFault(name, param), cancelled, runs)

    def settle(self, now: float) -> None:
        """Charge the runs that have completed by now."""
        due = "state = 'running' AND ready <= ?"
        freed, spent, count = self._one(f"SELECT total(reserved), total(cost), count(*) FROM runs WHERE {due}", [now])  # noqa: S608  # constant SQL
        if count:
            self._db.execute(f"UPDATE runs SET state = 'settled' WHERE {due}", [now])  # noqa: S608  # constant SQL
            self.reserved -= int(freed)
            self.spent += int(spent)

    def cancel(self, task: Task, now: float) -> None:
        """Refund the runs that have not completed; the caller settles the others before."""
        running = "task = ? AND state = 'running'"
        with self.transaction():
            freed = self._one(f"SELECT total(reserved) FROM runs WHERE {running}", [task.id])[0]  # noqa: S608  # constant SQL
            self._db.execute(f"UPDATE runs SET state = 'refunded' WHERE {running}", [task.id])  # noqa: S608  # constant SQL
            self._db.execute("UPDATE tasks SET cancelled = ? WHERE id = ?", [now, task.id])
        self.reserved -= int(freed)

    def totals(self) -> dict[str, int]:
        """Count accepted runs and lookups, how many lookups were paid twice, and the runs that were refunded."""
        row = self._one(
            "SELECT total(accepted), total(charged), count(*), total(accepted > 1), total(charged > 1) FROM"
            " (SELECT count(*) AS accepted, sum(charged) AS charged FROM bought GROUP BY lookup)"
        )
        names = ("accepted", "charged", "distinct", "accepted_more_than_once", "paid_twice")
        refunded = self._one("SELECT count(*) FROM runs WHERE state = 'refunded'")[0]
        return {**dict(zip(names, map(int, row), strict=True)), "refunded": int(refunded)}

    def provider_totals(self) -> list[tuple[str, int, int, int]]:
        """Return for each provider and verifier the settled runs: name, runs, finds, millionths."""
        return self._db.execute(
            "SELECT value->>0 AS name, count(DISTINCT run), sum(value->>1), sum(value->>2)"
            " FROM steps JOIN runs ON runs.id = run JOIN json_each(providers) WHERE state = 'settled'"
            " GROUP BY 1 ORDER BY 1"
        ).fetchall()

    def lookup_totals(self) -> list[tuple[Any, ...]]:
        """List all lookups: target and params (JSON), accepted, charged, millionths, task ids."""
        return self._db.execute(
            "SELECT target, params, count(*), sum(charged), sum(spent),"
            " group_concat(task_id, ' ')"
            " FROM bought JOIN lookups ON lookups.id = lookup JOIN tasks ON tasks.id = task"
            " GROUP BY lookup ORDER BY lookup"
        ).fetchall()

    def _one(self, sql: str, values: Iterable[Any] = ()) -> Any:  # noqa: ANN401  # a row's types depend on the SQL
        return self._db.execute(sql, tuple(values)).fetchone()


class StoredLookup(NamedTuple):
    """A lookup: its params and the `data` of its answers (JSON); `last_sent_at` in seconds since the epoch."""

    id: int
    params: str
    answers: list[str]
    last_sent_at: float


def read_lookups(state: Path) -> list[StoredLookup]:
    """Return the lookups that were not erased. Raises sqlite3.Error when another process uses the file."""
    with _open(state) as db:
        answers: dict[int, list[str]] = {}
        for lookup, data in db.execute("SELECT lookup, data FROM runs"):
            answers.setdefault(lookup, []).append(data)
        rows = db.execute(
            "SELECT lookups.id, params, max(tasks.created) FROM lookups JOIN runs ON lookup = lookups.id"
            " JOIN tasks ON tasks.id = task WHERE params <> '{}' GROUP BY 1"
        )
        return [StoredLookup(number, params, answers[number], last_sent_at) for number, params, last_sent_at in rows]


def unknown_tasks(state: Path, task_ids: Sequence[str]) -> list[str]:
    """Return the task ids that are not in the file. All of them if there is none, or if it cannot be read."""
    if not state.is_file():
        return list(task_ids)
    try:
        with _open(state) as db:
            find = "SELECT 1 FROM tasks WHERE task_id = ?"
            return [task for task in task_ids if db.execute(find, [task]).fetchone() is None]
    except sqlite3.Error:
        return list(task_ids)


def erase_lookups(state: Path, ids: Iterable[int]) -> None:
    """Erase params and answers, also from free pages and the journal. Raises sqlite3.Error as `read_lookups` does."""
    numbers = [(number,) for number in ids]
    with _open(state) as db:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("BEGIN IMMEDIATE")
        # The key is a hash of the params, which could be guessed.
        db.executemany("UPDATE lookups SET params = '{}', key = randomblob(16) WHERE id = ?", numbers)
        db.executemany("UPDATE runs SET data = 'null', error = '' WHERE lookup = ?", numbers)
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


@contextmanager
def _open(state: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(state, isolation_level=None, timeout=0.2)) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        yield db
