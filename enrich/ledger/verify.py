"""Checks a ledger and makes backups. Never changes the ledger and does not disturb a run."""

from __future__ import annotations

import errno
import os
import shlex
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path

import msgspec
from msgspec import Struct

from enrich.errors import UNWRITABLE_HINT, CommandRefused, EnrichError, LedgerDamaged, LedgerFailed
from enrich.job.locations import LedgerLocation, PostgresLocation
from enrich.json_text import parse_json
from enrich.ledger.database import Database, open_existing
from enrich.ledger.dialect import DATABASE_ERRORS, DatabaseFailed
from enrich.ledger.sqlite import Column, is_ledger_file, ledger_columns, orphan_query, remove_with_journals
from enrich.ledger.sqlite_errors import (
    damaged_ledger_error,
    describe_write_error,
    is_busy_error,
    is_damage_error,
    is_disk_error,
)
from enrich.models import pluralize

JSON_TYPE_NAMES: Mapping[type, str] = {dict: "object", list: "list"}


class LedgerCheck(Struct, frozen=True):
    """The result of a check. A count is None when it cannot be read."""

    problems: list[str]
    requests: int | None = None
    attempts: int | None = None
    executions: int | None = None


def check_ledger(location: LedgerLocation) -> LedgerCheck:
    """Check a ledger's file and invariants. Raises CommandRefused when it is missing or cannot be opened."""
    try:
        verifier = open_existing(location, skip_integrity_check=True)
    except LedgerDamaged as error:
        return LedgerCheck([f"the file is damaged{error.message.partition('is damaged')[2]}"])
    with closing(verifier):
        with suppress(*DATABASE_ERRORS):  # the file may be damaged
            verifier.session.begin_snapshot()
        counts = (_count(verifier, table) for table in ("requests", "attempts", "executions"))
        return LedgerCheck(list(problems(verifier)), *counts)


def as_enrich_error(error: Exception, ledger: object) -> EnrichError | None:
    """Return the error to show for an unexpected one that the system or the ledger causes; None: it is a bug.

    Without the text of a database error: that may quote the ledger's content.
    """
    if isinstance(error, EnrichError):
        return error
    if isinstance(error, MemoryError):
        return EnrichError("out of memory", "free some memory or raise its limit, then run the same command again")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        hint = "end other programs of this user or raise the limit (`ulimit -u`), then run the same command again"
        return EnrichError("no more threads or processes can be started", hint)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return EnrichError("too many open files", "raise the limit (`ulimit -n`), then run the same command again")
    if isinstance(error, DatabaseFailed):
        return LedgerFailed(f"the ledger's server failed: {error}", "run the same command again")
    if is_busy_error(error):
        hint = "end the program that holds the lock, then run the same command again"
        return LedgerFailed("another program has locked the ledger", hint)
    problem = None
    if isinstance(ledger, Path | PostgresLocation):
        with suppress(CommandRefused):  # it is missing
            problem = next(iter(check_ledger(ledger).problems), None)
    if problem is not None or is_damage_error(error):
        return damaged_ledger_error(ledger or "a database", (problem or "").removeprefix("the file is damaged: "))
    if is_disk_error(error):
        reason, hint = describe_write_error(error)
        return LedgerFailed(f"{ledger or 'a database'}: the ledger {reason}", hint)
    return None


def problems(db: Database) -> Iterator[str]:
    """Yield each problem as text: first of the file, then, if the file is sound, of the invariants."""
    has_damage = False
    try:
        for problem in db.session.integrity_problems():
            has_damage = True
            yield f"the file is damaged: {problem}"
    except (*DATABASE_ERRORS, UnicodeDecodeError):
        has_damage = True
        yield "the file is damaged: it cannot be read to its end"
    for problem in _unreadable_values(db):
        has_damage = True
        yield problem
    for invariant, query in () if has_damage else INVARIANTS.items():
        try:
            count = db.number(f"SELECT count(*) FROM ({query or orphan_query()}) AS broken")
        except DATABASE_ERRORS:
            yield f"cannot be checked: {invariant}"
            continue
        if count:
            yield f"{pluralize(count, 'time')}: {invariant}"


def _unreadable_values(db: Database) -> Iterator[str]:
    """Decode every value and parse every JSON column. Yield column and row of each broken value."""
    for table, group in groupby(ledger_columns(), key=lambda column: column.table):
        table_columns = list(group)
        if _is_readable(db, table, table_columns):
            continue
        expressions = [
            db.dialect.as_bytes.format(column.name) if column.kind is str else column.name for column in table_columns
        ]
        id_expression = "id" if "id" in expressions else "NULL"
        try:
            for row_number, (row_id, *values) in enumerate(
                db.stream(f"SELECT {id_expression}, {', '.join(expressions)} FROM {table}"), 1
            ):
                for column, value in zip(table_columns, values, strict=True):
                    if (problem := _value_problem(column, value)) is not None:
                        row_label = f"row {row_number}" if row_id is None else f"id {row_id}"
                        yield f"the file is damaged: {table}.{column.name}, {row_label}: {problem}"
        except (*DATABASE_ERRORS, UnicodeDecodeError):
            yield f"the file is damaged: the table {table} cannot be read"


def _is_readable(db: Database, table: str, columns: Sequence[Column]) -> bool:
    """Read a table as a whole, much faster than value by value. False: it has a broken value, or may have one."""
    json_places = [(place, column.json_types) for place, column in enumerate(columns) if column.json_types]
    row_types = set()
    try:
        for row in db.stream(f"SELECT {', '.join(column.name for column in columns)} FROM {table}"):
            row_types.add(tuple(map(type, row)))
            for place, types in json_places:
                if row[place] is not None and not isinstance(msgspec.json.decode(row[place]), types):
                    return False
    except (*DATABASE_ERRORS, msgspec.DecodeError, ValueError, RecursionError, TypeError):
        return False
    kinds = [column.kind for column in columns]
    return all(
        found is type(None) or issubclass(found, kind)
        for found_types in row_types
        for found, kind in zip(found_types, kinds, strict=True)
    )


def _count(db: Database, table: str) -> int | None:
    with suppress(*DATABASE_ERRORS):
        (count,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)
    return None


def backup(db: Database, target: Path) -> None:
    """Write a consistent copy (mode 0600) atomically, also during a run.

    Raises CommandRefused when the copy cannot be written or would replace a file that is not a copy.
    """
    from enrich.files.atomic import fsync_dir  # noqa: PLC0415 - it imports polars, which `ledger check` does not need

    if isinstance(db.location, PostgresLocation):
        command = shlex.join(["enrich", "ledger", "copy", str(db.location), str(target)])
        hint = f"back it up with pg_dump, or make a file of it: {command}"
        raise CommandRefused(f"{db.location}: a ledger on a server is no file that could be copied", hint)
    temporary = target.with_name(f".{target.name}.part")
    try:
        _check_target(target, db.location)
        remove_with_journals(temporary)
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with closing(sqlite3.connect(temporary)) as copy:
                db.session.backup(copy)  # type: ignore[union-attr] # a path, therefore SQLite
                # The copy must be a single file without a journal.
                copy.execute("PRAGMA journal_mode = DELETE")
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
        finally:
            with suppress(OSError):
                remove_with_journals(temporary)
        fsync_dir(target.parent)
    except OSError as error:
        message = f"{target}: the copy cannot be written: {error.strerror or error}"
        raise CommandRefused(message, UNWRITABLE_HINT) from error
    except sqlite3.Error as error:
        if is_damage_error(error):
            raise damaged_ledger_error(db.location) from error
        raise CommandRefused(f"{target}: the copy cannot be written: {error}") from error


def _value_problem(column: Column, value: object) -> str | None:
    """Return what is wrong with a value. None: nothing."""
    if value is None:
        return None
    if column.kind is not str:
        return None if isinstance(value, column.kind) else "of another type than its column"
    try:
        text = value if isinstance(value, str) else bytes(value).decode()  # type: ignore[call-overload]
    except UnicodeDecodeError:
        return "not UTF-8"
    with suppress(ValueError, RecursionError):
        if not column.json_types or isinstance(parse_json(text), column.json_types):
            return None
    return f"not a JSON {' or '.join(JSON_TYPE_NAMES[kind] for kind in column.json_types)}"


def _check_target(target: Path, ledger: Path) -> None:
    """Refuse to replace anything but an older copy."""
    if not target.exists():
        obstacle = None
    elif target.samefile(ledger):
        obstacle = "the ledger itself"
    elif not target.is_file():
        obstacle = "no file"
    elif any(target.with_name(target.name + ending).exists() for ending in (".lock", "-wal", "-journal")):
        obstacle = "a ledger that is in use"
    else:
        obstacle = "no copy of a ledger" if target.stat().st_size and not is_ledger_file(target) else None
    if obstacle is not None:
        raise CommandRefused(f"{target}: this is {obstacle}", "choose another file for the copy")
    if target.with_name(target.name + "-wal").exists():
        # SQLite would apply it to the copy.
        raise CommandRefused(f"{target}: its folder has the journal of a missing database", "choose another file")


#: Each invariant with a query for the rows that violate it; None: `orphan_query`. A query reads each table a few
#: times at most.
INVARIANTS: Mapping[str, str | None] = {
    "request with another state than its newest attempt": (
        # After a failure at no charge the request waits again. After `--accept in_doubt` the attempt stays in_doubt.
        "SELECT 1 FROM requests r LEFT JOIN attempts a ON a.id = r.attempt_id WHERE CASE r.state "
        "WHEN 'pending' THEN coalesce(a.state, 'refused') NOT IN ('refused', 'failed') "
        "WHEN 'failed' THEN coalesce(a.state, '') NOT IN ('failed', 'in_doubt') "
        "ELSE r.state IS DISTINCT FROM a.state END"
    ),
    "request with the newest attempt or answer of another request": (
        "SELECT 1 FROM requests r JOIN attempts a ON a.id IN (r.attempt_id, r.answer_id) WHERE a.request_id <> r.id"
    ),
    "request with two running attempts": (
        "SELECT 1 FROM attempts WHERE state IN ('submitting', 'submitted') GROUP BY request_id HAVING count(*) > 1"
    ),
    "running attempt that its request does not wait for": (
        "SELECT 1 FROM attempts a JOIN requests r ON r.id = a.request_id "
        "WHERE a.state IN ('submitting', 'submitted') AND r.attempt_id IS DISTINCT FROM a.id"
    ),
    "answer that is not the newest match": (
        "SELECT 1 FROM requests r LEFT JOIN attempts a ON a.id = r.answer_id "
        "WHERE r.answer_id IS NOT NULL AND coalesce(a.state, '') NOT IN ('found', 'not_found') UNION ALL "
        "SELECT 1 FROM attempts a JOIN requests r ON r.id = a.request_id "
        "WHERE a.state = 'found' AND a.id > coalesce(r.answer_id, 0)"
    ),
    "settled attempt without an answer": (
        "SELECT 1 FROM attempts WHERE state IN ('found', 'not_found') AND answer IS NULL AND erased_ms IS NULL"
    ),
    "task without its id": (
        "SELECT 1 FROM attempts WHERE task_id IS NULL AND erased_ms IS NULL "
        "AND (submitted_ms IS NOT NULL OR state IN ('submitted', 'found', 'not_found', 'expired'))"
    ),
    "row that refers to one that is not there": None,
    "run with a negative reservation": "SELECT 1 FROM executions WHERE reserved < 0",
    "run without a reservation for its running tasks": (
        "SELECT 1 FROM executions WHERE id = (SELECT max(id) FROM executions) AND reserved < "
        "(SELECT coalesce(sum(reserved), 0) FROM attempts WHERE state IN ('submitting', 'submitted'))"
    ),
    "run with other spending than the sum of its attempts": (
        "SELECT 1 FROM executions e LEFT JOIN (SELECT settled_execution_id, coalesce(sum(paid), 0) AS spent, "
        "count(*) FILTER (WHERE paid IS NULL) AS unknown FROM billed WHERE settled_execution_id IS NOT NULL "
        "GROUP BY settled_execution_id) a ON a.settled_execution_id = e.id "
        "WHERE e.spent <> coalesce(a.spent, 0) OR e.unknown <> coalesce(a.unknown, 0)"
    ),
    "run with another number of submitted requests than counted": (
        "SELECT 1 FROM executions e LEFT JOIN (SELECT execution_id, count(submitted_ms) AS submitted "
        "FROM attempts GROUP BY execution_id) a ON a.execution_id = e.id WHERE e.submitted <> coalesce(a.submitted, 0)"
    ),
    "run that reserved more than its cap": (
        # Tasks left open by earlier runs, and charges above the maximum price, may exceed the cap. The cost of a bulk
        # task is divided evenly, as its rows reserve the same amount. 0.5 allows for rounding.
        "SELECT 1 FROM executions e JOIN attempts a ON a.execution_id = e.id "
        "LEFT JOIN bulk_tasks b ON b.id = a.bulk_task_id WHERE e.cap IS NOT NULL GROUP BY e.id "
        "HAVING sum(CASE WHEN coalesce(a.credits, b.credits * 1.0 / b.size, a.reserved) < a.reserved "
        "THEN coalesce(a.credits, b.credits * 1.0 / b.size) ELSE a.reserved END) > e.cap + 0.5"
    ),
    "bulk task that differs from its attempts": (
        "SELECT 1 FROM bulk_tasks b LEFT JOIN attempts a ON a.bulk_task_id = b.id GROUP BY b.id "
        "HAVING count(a.id) <> b.size "
        "OR count(DISTINCT a.bulk_index) <> b.size OR min(a.bulk_index) <> 0 OR max(a.bulk_index) <> b.size - 1 "
        "OR count(DISTINCT a.task_id) > 1 OR count(*) FILTER (WHERE a.execution_id <> b.execution_id) > 0 "
        "OR count(*) FILTER (WHERE a.settled_execution_id IS DISTINCT FROM b.settled_execution_id "
        "AND a.task_id IS NOT NULL) > 0"
    ),
    "row of a bulk task with its own price": ("SELECT 1 FROM attempts WHERE bulk_task_id IS NOT NULL AND credits <> 0"),
}
