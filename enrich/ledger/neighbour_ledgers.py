"""Compares a ledger with the other ledger files of its folder, read-only: what they have paid for already."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from enrich.errors import EnrichError
from enrich.job.locations import is_sandbox_ledger
from enrich.ledger import records
from enrich.ledger.database import Database
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.file_identity import file_identity
from enrich.ledger.sqlite import JOURNAL_SUFFIXES, is_ledger_file

#: How long to wait for a neighbour that another process writes, in milliseconds.
_BUSY_TIMEOUT_MS = 2_000
#: Requests that are looked up with one statement.
_CHUNK = 500
#: States of a request that has an answer, or waits for one that was paid for.
_PAID = "state IN ('found', 'not_found', 'submitted')"
_UNREADABLE = (EnrichError, OSError, *DATABASE_ERRORS)


@dataclass(slots=True)
class Overlap:
    """How many of the `requests` the neighbours have paid for, in all and by ledger.

    `unread` are ledgers that could not be read, or not to their end in the given time.
    """

    requests: int = 0
    paid: int = 0
    by_ledger: Counter[Path] = field(default_factory=Counter)
    unread: list[Path] = field(default_factory=list)


def find_ledger_files(folder: Path, own: Path | None = None) -> list[Path]:
    """Return the ledgers in a folder, except `own` and those of the sandbox. A folder that cannot be read has none."""
    found: list[Path] = []
    seen = {None, None if own is None else file_identity(own)}
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            # Opening a pipe would block.
            if (identity := file_identity(path)) in seen or not path.is_file():
                continue
            if not is_sandbox_ledger(path) and not path.name.endswith(JOURNAL_SUFFIXES):
                seen.add(identity)
                if is_ledger_file(path):
                    found.append(path)
    return found


def compare_with_neighbours(
    batches: Iterable[list[bytes]], ledger: Path, bound_to: Mapping[str, str | None], timeout_s: float
) -> Overlap:
    """Look up requests in the neighbours of `ledger` that have the same API host and workspace.

    `batches` has their fingerprints, many at a time; without such a neighbour it is not read. The look-up takes about
    `timeout_s` seconds at most. Nothing is raised for a neighbour.
    """
    overlap, deadline = Overlap(), time.monotonic() + timeout_s
    with ExitStack() as stack:
        neighbours, overlap.unread = _open_neighbours(ledger, bound_to, stack)
        for fingerprints in batches if neighbours else ():
            overlap.requests += len(fingerprints)
            paid: set[tuple[bytes]] = set()
            marks = ",".join("?" * len(fingerprints))
            query = f"SELECT fingerprint FROM requests WHERE fingerprint IN ({marks}) AND {_PAID}"
            for path, neighbour in list(neighbours.items()):
                try:
                    found = set(neighbour.execute(query, fingerprints)) if time.monotonic() < deadline else None
                except _UNREADABLE:
                    found = None
                if found is None:
                    overlap.unread.append(path)
                    del neighbours[path]
                elif found:
                    overlap.by_ledger[path] += len(found)
                    paid |= found
            overlap.paid += len(paid)
    return overlap


def _open_neighbours(
    ledger: Path, bound_to: Mapping[str, str | None], stack: ExitStack
) -> tuple[dict[Path, Database], list[Path]]:
    """Open the neighbours with the same API host and workspace. Also return those that cannot be read."""
    neighbours: dict[Path, Database] = {}
    unread = []
    for path in find_ledger_files(ledger.parent, ledger):
        try:
            neighbour = stack.enter_context(closing(Database(path, read_only=True, skip_integrity_check=True)))
            neighbour.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
            if _has_same_binding(neighbour, bound_to):
                neighbours[path] = neighbour
        except _UNREADABLE:
            unread.append(path)
    return neighbours, unread


def _has_same_binding(db: Database, bound_to: Mapping[str, str | None]) -> bool:
    """Check host and workspace. If a workspace is not known, the same host is enough."""
    bound = {name: records.read_fact(db, name) for name in bound_to}
    return bound.get("api_host") is not None and all(
        None in (value, bound[name]) or value == bound[name] for name, value in bound_to.items()
    )


def seen_fingerprints(db: Database) -> Iterator[list[bytes]]:
    """Yield the requests that this pass has seen and that were never answered, many at a time."""
    seen = "SELECT fingerprint FROM requests WHERE state = 'pending' AND id IN (SELECT id FROM seen)"
    unknown = "SELECT fingerprint FROM unknown_requests WHERE -id IN (SELECT id FROM seen)"
    return _in_chunks(db.execute(f"{seen} UNION ALL {unknown}"))


def planned_fingerprints(db: Database) -> Iterator[list[bytes]]:
    """Yield the distinct requests of a plan of steps, many at a time."""
    return _in_chunks(db.execute("SELECT DISTINCT fingerprint FROM planned_requests"))


def _in_chunks(rows: Iterable[tuple[bytes]]) -> Iterator[list[bytes]]:
    remaining = iter(rows)
    while chunk := [fingerprint for (fingerprint,) in islice(remaining, _CHUNK)]:
        yield chunk
