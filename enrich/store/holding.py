"""Who is at what: processes that share a ledger hold what they send and poll by leases (PostgreSQL).

A process is an owner, whose lease lasts as long as it says now and then that it lives. What an owner holds whose lease
ran out is in doubt when it was on the wire, and anybody's when it waits for its answer. In a file, which only one
execution opens, everything is always ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from enrich.errors import LeaderGone
from enrich.model import Task, written
from enrich.store.intake import OPEN_ATTEMPT
from enrich.store.moves import Moves
from enrich.store.process import is_gone, myself
from enrich.store.task_ids import NUMBERS

#: A lease that ran out while the server was down goes on: nobody could say that he lived.
_LEFT_S = (
    "extract(epoch FROM greatest(lease_until, pg_postmaster_start_time() + seconds * interval '1 s') "
    "- clock_timestamp())"
)
_ME = "nullif(current_setting('enrich.owner', true), '')::bigint"


class Owner(NamedTuple):
    """A process that holds a lease: for how many seconds yet, and until when by the server's clock (seconds)."""

    id: int
    name: str
    leads: bool
    left_s: float
    until_s: float


class Holding(Moves):
    """A ledger that knows who is at what."""

    def recover(self, now_ms: int) -> int:
        """Put what a crash left in `submitting` in doubt (edge d); return how many.

        What another process holds by its lease is none of it; what one held that is gone waits for any poller.
        """
        self.others()
        # What is left is told once: others may end a lease in any moment.
        left = self._db.execute(
            "UPDATE attempts SET state = 'in_doubt', settled_ms = ?, error = 'the program ended between the request "
            f"and its answer' WHERE state = 'submitting' AND {OPEN_ATTEMPT} AND {self._db.dialect.ours} RETURNING id",
            (now_ms,),
        ).fetchall()
        if left:
            self._db.execute(
                "UPDATE requests SET state = 'in_doubt', attempts = attempts + 1, position = NULL "
                f"WHERE state = 'submitting' AND attempt_id IN ({NUMBERS.format('?')})",
                (written([number for (number,) in left]),),
            )
        return len(left)

    def adopt(self, most: int | None = None) -> list[Task]:
        """Take on tasks that wait for their answer and that nobody holds, nearest expiry first; return them."""
        if not self._db.dialect.leases:
            return self.tasks()
        free = f"state = 'submitted' AND {OPEN_ATTEMPT} AND {self._db.dialect.ours} AND owner_id IS DISTINCT FROM {_ME}"
        taken = self._db.execute(
            f"UPDATE attempts SET owner_id = {_ME} WHERE id IN (SELECT id FROM attempts WHERE {free} "
            f"ORDER BY submitted_ms, bundle_id LIMIT ? FOR UPDATE SKIP LOCKED) RETURNING id, bundle_id",
            (most,),
        ).fetchall()
        if not taken:
            return []
        numbers = {number for number, _ in taken}
        if bundles := {bundle for _, bundle in taken if bundle is not None}:
            rows = self._db.execute(
                f"UPDATE attempts SET owner_id = {_ME} WHERE bundle_id = ANY(?) AND {OPEN_ATTEMPT} RETURNING id",
                (sorted(bundles),),
            ).fetchall()
            numbers |= {number for (number,) in rows}
        return [task for task in self.tasks() if numbers.issuperset(task.attempts)]

    def release(self) -> None:
        """Leave what waits for its answer to other pollers."""
        self._db.execute(
            f"UPDATE attempts SET owner_id = NULL WHERE state = 'submitted' AND {OPEN_ATTEMPT} AND owner_id = {_ME}"
        )

    def others(self) -> list[Owner]:
        """Return the other processes that may hold something, those that lead an execution first."""
        if not self._db.dialect.leases:
            return []
        self._end_lapsed()
        rows = self._db.execute(
            f"SELECT id, name, leads, {_LEFT_S}, extract(epoch FROM lease_until), process FROM owners "
            f"WHERE id IS DISTINCT FROM {_ME} ORDER BY leads DESC, id"
        ).fetchall()
        return [
            Owner(number, name, leads, float(left_s), float(until))
            for number, name, leads, left_s, until, process in rows
            if not self._end_if_gone(number, process)
        ]

    def end_lease_of(self, owners: Iterable[Owner]) -> None:
        """Let none of these renew its lease any more; they find out when they try."""
        numbers = [owner.id for owner in owners]
        self._db.execute("UPDATE owners SET seconds = 0 WHERE id = ANY(?)", (numbers,))

    def now_ms(self) -> int:
        """Tell what time the server has, in milliseconds since 1970 (UTC)."""
        (now_ms,) = self._db.execute("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint").fetchone()
        return int(now_ms)

    def begin_lease(self, name: str, seconds: float, *, follows: int | None = None) -> int:
        """Become an owner; return its number. Without somebody whom it `follows` it leads an execution.

        Raises LeaderGone when whoever leads is an owner no more: nobody would wait for who begins only now.
        """
        told = (name, myself(), follows is None, float(seconds))
        insert = (
            "INSERT INTO owners (name, process, leads, seconds, lease_until) "
            "SELECT ?1, ?2, CAST(?3 AS BOOLEAN), CAST(?4 AS DOUBLE PRECISION), clock_timestamp() + ?4 * interval '1 s'"
        )
        if follows is None:
            row = self._db.execute(f"{insert} RETURNING id", told).fetchone()
        else:
            # Its row is kept until ours is there: whoever looks for those who are left sees one of both.
            leader = "FROM owners WHERE id = ?5 AND owners.seconds > 0 FOR KEY SHARE"
            row = self._db.execute(f"{insert} {leader} RETURNING id", (*told, follows)).fetchone()
        if row is None:
            raise LeaderGone
        return int(row[0])

    def renew_lease(self, owner: int) -> bool:
        """Say that an owner lives; return False when its lease was ended."""
        return bool(
            self._db.execute(
                "UPDATE owners SET lease_until = clock_timestamp() + seconds * interval '1 s' "
                "WHERE id = ? AND seconds > 0",
                (owner,),
            ).rowcount
        )

    def end_lease(self, owner: int) -> None:
        """Be an owner no more: what it held is free at once."""
        self._db.execute("DELETE FROM owners WHERE id = ?", (owner,))

    def _end_lapsed(self) -> None:
        """End the leases that ran out. Who is in the middle of a transaction lives, whatever its lease says."""
        if self._db.dialect.leases:
            self._db.execute(
                f"DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE {_LEFT_S} <= 0 FOR UPDATE SKIP LOCKED)"
            )

    def _end_if_gone(self, owner: int, process: str) -> bool:
        """End the lease of a process of this machine that is there no more; no need to wait until it runs out.

        Not yet while the server is at a transaction of it.
        """
        return is_gone(process) and bool(
            self._db.execute(
                "DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE id = ? FOR UPDATE SKIP LOCKED)", (owner,)
            ).rowcount
        )
