"""What a ledger records besides requests.

Runs (`executions`), what the ledger is bound to (API host, workspace), descriptions of targets, how long their tasks
take, and what change feeds have delivered.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from enrich.exit_codes import exit_label
from enrich.job.target import Target, TargetKind
from enrich.ledger.database import Database
from enrich.ledger.decisions import FINGERPRINT, as_list
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
    # Wait for the claims of other processes, which change this row, too. The next statement sees what they wrote.
    db.execute("UPDATE executions SET reserved = reserved WHERE id = ?", (execution_id,))
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


def read_fact(db: Database, name: str) -> str | None:
    """Return what the ledger is bound to (`api_host`, `workspace`). None: not bound yet."""
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def bind(db: Database, facts: Mapping[str, str | None]) -> None:
    """Bind the ledger to facts. A fact that is already bound stays unchanged."""
    new_facts = [(name, value) for name, value in facts.items() if value is not None and name not in db.known_facts]
    if not new_facts:
        return
    # Facts that were read are permanent. Our own insert may still be rolled back.
    db.known_facts = frozenset(name for (name,) in db.execute("SELECT name FROM facts").fetchall())
    db.executemany("INSERT INTO facts VALUES (?, ?) ON CONFLICT DO NOTHING", new_facts)


def rename_workspace(db: Database, name: str) -> None:
    """Rename the workspace that the ledger is bound to."""
    db.execute("UPDATE facts SET value = ? WHERE name = 'workspace'", (name,))


def load_description(db: Database, target: Target) -> tuple[dict[str, Any], list[int] | None] | None:
    """Return the latest description of a target, and a waterfall's default providers as first resolved."""
    row = db.execute(
        "SELECT description, providers FROM targets WHERE kind = ? AND identifier = ?", (target.kind, target.id)
    ).fetchone()
    return None if row is None else (json.loads(row[0]), None if row[1] is None else json.loads(row[1]))


def save_description(db: Database, target: Target, description: Mapping[str, Any], providers: Sequence[int]) -> None:
    """Store the description and replace the providers. Pass the stored providers to keep them."""
    db.execute(
        "INSERT INTO targets VALUES (?, ?, ?, ?) ON CONFLICT (kind, identifier) DO UPDATE "
        "SET description = excluded.description, providers = excluded.providers",
        (target.kind, target.id, json.dumps(description, ensure_ascii=False), json.dumps(list(providers))),
    )


def load_descriptions(db: Database) -> dict[tuple[TargetKind, str], Any]:
    """Return the latest description of all targets, by kind and id."""
    rows = db.execute("SELECT kind, identifier, description FROM targets").fetchall()
    return {(TargetKind(kind), identifier): json.loads(description) for kind, identifier, description in rows}


def load_latencies(db: Database, target: Target, bulk_size: int | None = None) -> list[tuple[float, float]]:
    """Return pairs (seconds, answers): how many answers took at most that many seconds. Empty before the first run.

    With `bulk_size`, those of bulk tasks with that many requests.
    """
    return db.execute(
        "SELECT seconds, answers FROM latencies WHERE call = ? ORDER BY seconds", (_call_key(target, bulk_size),)
    ).fetchall()


def save_latencies(
    db: Database, target: Target, learned: Iterable[tuple[float, float]], bulk_size: int | None = None
) -> None:
    """Replace the stored durations of a target."""
    name = _call_key(target, bulk_size)
    db.execute("DELETE FROM latencies WHERE call = ?", (name,))
    db.executemany("INSERT INTO latencies VALUES (?, ?, ?)", ((name, seconds, answers) for seconds, answers in learned))


def _call_key(target: Target, bulk_size: int | None) -> str:
    return target.canonical() + ("" if bulk_size is None else f" bulk {bulk_size}")


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
