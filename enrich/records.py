"""Reads a ledger for people: money, invariants, a copy. Never changes it, and disturbs no run."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from enrich.database import Database
from enrich.errors import Refused


@dataclass(frozen=True, slots=True)
class Money:
    """What the ledger knows of its spending; credits in millionths.

    `running`, `doubtful` and `expired` hold (number, worst price in all): what they really cost is not
    known, and what the API had reserved for them may have been given back.
    """

    spent: int
    running: tuple[int, int]
    doubtful: tuple[int, int]
    expired: tuple[int, int]
    unpriced: tuple[int, int]


class Records(Database):
    """A ledger that is only looked into."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises Refused when it is not there or is no ledger."""
        if not path.exists():
            raise Refused(f"{path}: there is no such ledger", "it is made by the first `enrich run`")
        super().__init__(path, read_only=True)

    def money(self, since_execution: int = 0) -> Money:
        """Sum up what attempts cost that were made or settled since an execution."""
        rows = self._db.execute(
            "SELECT CASE WHEN credits IS NOT NULL THEN 'known' ELSE state END, "
            "count(*), coalesce(sum(credits), 0), sum(reserved) FROM attempts "
            "WHERE execution_id >= ?1 OR settled_in >= ?1 GROUP BY 1",
            (since_execution,),
        ).fetchall()
        known = {kind: (count, credits_, reserved) for kind, count, credits_, reserved in rows}

        def open_ones(*kinds: str) -> tuple[int, int]:
            found = [known[kind] for kind in kinds if kind in known]
            return sum(count for count, _, _ in found), sum(reserved for _, _, reserved in found)

        return Money(
            spent=known.get("known", (0, 0, 0))[1],
            running=open_ones("submitting", "submitted"),
            doubtful=open_ones("in_doubt"),
            expired=open_ones("expired"),
            unpriced=open_ones("found", "not_found", "failed"),
        )

    def problems(self) -> Iterator[str]:
        """Check the file and its invariants; yield what does not hold, in words."""
        for (said,) in self._db.execute("PRAGMA integrity_check"):
            if said != "ok":
                yield f"the file is damaged: {said}"
        for broken, query in INVARIANTS.items():
            (count,) = self._db.execute(f"SELECT count(*) FROM ({query})").fetchone()
            if count:
                yield f"{count:,} times: {broken}"

    def backup(self, target: Path) -> None:
        """Make a consistent copy (0600), whole or not at all, while a run may go on.

        Raises Refused when the copy cannot be written or would replace the ledger.
        """
        part = target.with_name(f".{target.name}.part")
        try:
            if target.exists() and target.samefile(self.path):
                raise Refused(f"{target}: this is the ledger itself", "choose another file")
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with _removed_on_failure(part):
                with closing(sqlite3.connect(part)) as copy:
                    self._db.backup(copy)
                    # A copy is one file: nothing of it lies in a journal beside it.
                    copy.execute("PRAGMA journal_mode = DELETE")
                with part.open("rb") as written:
                    os.fsync(written.fileno())
                part.replace(target)
        except (OSError, sqlite3.Error) as error:
            raise Refused(f"{target}: the copy cannot be written: {error}") from error


@contextmanager
def _removed_on_failure(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


#: What must hold, as queries for the rows in which it does not.
INVARIANTS = {
    "request whose newest attempt is at the API while it is not, or the reverse": (
        "SELECT 1 FROM requests r LEFT JOIN attempts a ON a.id = r.attempt_id "
        "WHERE (r.state IN ('submitting', 'submitted')) IS NOT (coalesce(a.state, '') IN ('submitting', 'submitted')) "
        "OR (r.state IN ('submitting', 'submitted') AND r.state <> a.state)"
    ),
    "request that is settled without an attempt of that outcome": (
        "SELECT 1 FROM requests r LEFT JOIN attempts a ON a.id = r.attempt_id "
        "WHERE r.state IN ('found', 'not_found', 'failed', 'expired', 'in_doubt') AND r.state IS NOT a.state"
    ),
    "request with two attempts at the API at once": (
        "SELECT 1 FROM attempts WHERE state IN ('submitting', 'submitted') GROUP BY request_id HAVING count(*) > 1"
    ),
    "answer that belongs to another request, or is none": (
        "SELECT 1 FROM requests r JOIN attempts a ON a.id = r.answer_id "
        "WHERE a.request_id <> r.id OR a.state NOT IN ('found', 'not_found')"
    ),
    "task without its id": "SELECT 1 FROM attempts WHERE state = 'submitted' AND task_id IS NULL",
    "task id that two attempts have": (
        "SELECT 1 FROM attempts WHERE task_id IS NOT NULL GROUP BY task_id HAVING count(*) > 1"
    ),
    "attempt of no request": "SELECT 1 FROM attempts WHERE request_id NOT IN (SELECT id FROM requests)",
    "execution that has reserved less than nothing": "SELECT 1 FROM executions WHERE reserved < 0",
    "execution whose spending is not the sum of what it settled": (
        "SELECT 1 FROM executions e WHERE e.spent <> "
        "(SELECT coalesce(sum(a.credits), 0) FROM attempts a WHERE a.settled_in = e.id)"
    ),
    "execution that spent more than its cap": "SELECT 1 FROM executions WHERE spent > cap",
}
