"""Who is at what: processes that share a ledger hold what they send and poll by leases (PostgreSQL).

A process is an owner, whose lease lasts as long as it says now and then that it lives. What an owner holds whose lease
ran out is in doubt when it was on the wire, and anybody's when it waits for its answer. In a file, which only one
execution opens, everything is always ours.
"""

from __future__ import annotations

from enrich.model import Task
from enrich.store.intake import OPEN_ATTEMPT
from enrich.store.moves import Moves

#: A lease that ran out while the server was down goes on: nobody could say that he lived.
_LEFT_S = (
    "extract(epoch FROM greatest(lease_until, pg_postmaster_start_time() + seconds * interval '1 s') "
    "- clock_timestamp())"
)
_ME = "nullif(current_setting('enrich.owner', true), '')::bigint"


class Holding(Moves):
    """A ledger that knows who is at what."""

    def recover(self, now_ms: int) -> int:
        """Put what a crash left in `submitting` in doubt (edge d); return how many.

        What another process holds by its lease is none of it; what one held that is gone waits for any poller.
        """
        self._end_lapsed()
        left = f"state = 'submitting' AND {OPEN_ATTEMPT} AND {self._db.dialect.ours}"
        self._db.execute(
            "UPDATE requests SET state = 'in_doubt', attempts = attempts + 1, position = NULL "
            f"WHERE id IN (SELECT request_id FROM attempts WHERE {left})"
        )
        return self._db.execute(
            "UPDATE attempts SET state = 'in_doubt', settled_ms = ?, error = 'the program ended between the request "
            f"and its answer' WHERE {left}",
            (now_ms,),
        ).rowcount

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
        if self._db.dialect.leases:
            self._db.execute(
                f"UPDATE attempts SET owner_id = NULL WHERE state = 'submitted' AND {OPEN_ATTEMPT} AND owner_id = {_ME}"
            )

    def others_at_work(self) -> float:
        """Tell for how many seconds at most another process may hold something; 0: none is at work."""
        if not self._db.dialect.leases:
            return 0.0
        self._end_lapsed()
        (left_s,) = self._db.execute(f"SELECT max({_LEFT_S}) FROM owners WHERE id IS DISTINCT FROM {_ME}").fetchone()
        return 0.0 if left_s is None else max(0.001, float(left_s))

    def now_ms(self) -> int:
        """Tell what time the server has, in milliseconds since 1970 (UTC)."""
        (now_ms,) = self._db.execute("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint").fetchone()
        return int(now_ms)

    def begin_lease(self, name: str, seconds: float) -> int:
        """Become an owner; return its number."""
        (number,) = self._db.execute(
            "INSERT INTO owners (name, seconds, lease_until) "
            "VALUES (?1, ?2, clock_timestamp() + ?2 * interval '1 s') RETURNING id",
            (name, float(seconds)),
        ).fetchone()
        return int(number)

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

    def end_other_leases(self) -> None:
        """Let nobody else renew a lease; those who hold one find out when they try."""
        if self._db.dialect.leases:
            self._db.execute(f"UPDATE owners SET seconds = 0 WHERE id IS DISTINCT FROM {_ME} AND seconds > 0")

    def _end_lapsed(self) -> None:
        """End the leases that ran out. Who is in the middle of a transaction lives, whatever its lease says."""
        if self._db.dialect.leases:
            self._db.execute(
                f"DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE {_LEFT_S} <= 0 FOR UPDATE SKIP LOCKED)"
            )
