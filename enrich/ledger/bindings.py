"""What a ledger is bound to (API host, workspace), and its data about the API: descriptions, durations of tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from enrich.job.target import Target, TargetKind
from enrich.ledger.database import Database


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
