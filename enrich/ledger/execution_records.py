"""The record of runs (`executions`): when each started and ended, its cap, its credits, its summary."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct

from enrich.exit_codes import exit_label
from enrich.ledger.database import Database
from enrich.ledger.dialect import MAX_ROWS, OPEN_ATTEMPT

#: Paths of the columns of a job, or of each of its steps.
Paths = Sequence[str] | Mapping[str, Sequence[str]]


class ExecutionRow(Struct, frozen=True):
    """One run. Times are milliseconds since 1970 (UTC), credits are millionths, JSON is text; None: not known."""

    id: int
    job: str
    started_ms: int
    ended_ms: int | None
    exit_code: int | None
    cap: int | None
    reserved: int
    spent: int
    unknown: int
    submitted: int
    balance_before: int | None
    balance_after: int | None
    summary: str | None
    progress: str | None

    def read_summary(self) -> Mapping[str, Any]:
        """Return the fields of the run summary. Empty: the run is in progress or was killed."""
        return json.loads(self.summary) if self.summary else {}

    def outcome(self, *, is_running: bool) -> str:
        """Return how the run ended, in a word or two. `is_running`: it is the run that holds the lock."""
        if self.exit_code is None:
            return "running" if is_running else "killed"
        is_cancellation = not self.exit_code and self.read_summary().get("command") == CANCEL
        return "cancellation" if is_cancellation else exit_label(self.exit_code)


#: The `command` in the summary of `enrich cancel`, which has an execution of its own.
CANCEL = "cancel"
_COLUMNS = ", ".join(ExecutionRow.__struct_fields__)


def start_execution(  # noqa: PLR0913, PLR0917 - each is a column
    db: Database, job: str, cap: int | None, now_ms: int, balance: int | None = None, paths: Paths = ()
) -> int:
    """Start a run and return its id. Tasks still open from earlier runs are settled in it and count against `cap`.

    `paths` are the job's columns, by step if it has steps. A later run that collects answers of this one uses them to
    decide what is a match.
    """
    return db.number(
        "INSERT INTO executions (job, started_ms, cap, balance_before, paths, reserved) VALUES (?, ?, ?, ?, ?, "
        f"(SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT})) RETURNING id",
        job,
        now_ms,
        cap,
        balance,
        json.dumps(paths),
    )


def read_paths(paths: str, step: str | None) -> list[str]:
    """Return the paths of the columns of a step (None: of the job) from the JSON of a run."""
    known = json.loads(paths)
    return list(known.get(step, ()) if isinstance(known, dict) else known)


def save_progress(db: Database, execution_id: int, progress: str) -> None:
    """Store the progress of a run (JSON), unless it has ended."""
    db.execute("UPDATE executions SET progress = ? WHERE id = ? AND ended_ms IS NULL", (progress, execution_id))


def end_execution(  # noqa: PLR0913, PLR0917 - each is a column
    db: Database, execution_id: int, exit_code: int, summary: Mapping[str, Any], now_ms: int, balance: int | None = None
) -> None:
    """Store how a run ended."""
    db.execute(
        "UPDATE executions SET ended_ms = ?, exit_code = ?, summary = ?, balance_after = ? WHERE id = ?",
        (now_ms, exit_code, json.dumps(summary), balance, execution_id),
    )


def delete_unless_used(db: Database, execution_id: int) -> bool:
    """Delete a run in which nothing happened. Returns whether that was so."""
    deleted = db.execute(
        "DELETE FROM executions WHERE id = ?1 AND submitted = 0 "
        "AND NOT EXISTS (SELECT 1 FROM attempts WHERE execution_id = ?1 OR settled_execution_id = ?1)",
        (execution_id,),
    )
    return deleted.rowcount > 0


def has_submitted(db: Database, job: str) -> bool:
    """Return whether anything was ever submitted for a job."""
    return db.exists("FROM executions WHERE submitted > 0 AND job = ?", job)


def has_own_submissions(db: Database) -> bool:
    """Return whether a run of this ledger had a POST accepted. Attempts from a rescue file do not count."""
    return db.exists("FROM executions WHERE submitted > 0 AND (summary IS NOT NULL OR ended_ms IS NULL)")


def last_run_ms(db: Database) -> int | None:
    """Return when the last run ended, or started if it was killed (ms). None: the ledger is new."""
    if not has_own_submissions(db):
        return None
    return db.number("SELECT coalesce(ended_ms, started_ms) FROM executions ORDER BY id DESC LIMIT 1")


def has_sent_step(db: Database, step: str) -> bool:
    """Return whether a step has sent anything from this ledger."""
    return db.exists("FROM attempts WHERE step = ?", step)


def has_written(db: Database, path: str) -> bool:
    """Return whether a run names this file as its output, rejects or changes."""
    fields = ", ".join(f"summary{db.dialect.as_json}->>'{name}'" for name in ("output", "rejects", "changes"))
    return db.exists(f"FROM executions WHERE ? IN ({fields})", path)


def last_writer(db: Database, output: str) -> str | None:
    """Return the job that last wrote this output. None: no run has."""
    found = db.execute(
        f"SELECT job FROM executions WHERE summary{db.dialect.as_json}->>'output' = ? ORDER BY id DESC LIMIT 1",
        (output,),
    ).fetchone()
    return None if found is None else str(found[0])


def read_execution(db: Database, execution_id: int) -> ExecutionRow:
    """Return one run."""
    return ExecutionRow(*db.execute(f"SELECT {_COLUMNS} FROM executions WHERE id = ?", (execution_id,)).fetchone())


def list_executions(db: Database, job: str | None = None, last: int = MAX_ROWS) -> list[ExecutionRow]:
    """Return the newest `last` runs, of one job if given, newest first."""
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM executions WHERE CAST(?1 AS TEXT) IS NULL OR job = ?1 ORDER BY id DESC LIMIT ?2",
        (job, last),
    )
    return [ExecutionRow(*row) for row in rows]


def newest_execution_id(db: Database) -> int:
    """Return the id of the newest run of any job, 0 when there is none."""
    return db.number("SELECT coalesce(max(id), 0) FROM executions")


def last_ended_ms(db: Database, job: str, codes: Collection[int]) -> int | None:
    """Return when a run of a job last ended with one of these exit codes (ms). None: never."""
    placeholders = ",".join("?" * len(codes))
    ended_ms = db.value(
        f"SELECT max(ended_ms) FROM executions WHERE job = ? AND exit_code IN ({placeholders}) "
        f"AND coalesce(summary{db.dialect.as_json}->>'command', '') <> '{CANCEL}'",
        job,
        *codes,
    )
    return None if ended_ms is None else int(ended_ms)


def has_other_jobs(db: Database, job: str) -> bool:
    """Return whether another job has run with this ledger."""
    return db.exists("FROM executions WHERE job <> ?", job)
