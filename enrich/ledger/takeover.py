"""Who is at what: processes that share a ledger hold what they send and poll by leases (PostgreSQL).

A process is an owner, whose lease lasts as long as it says now and then that it lives. What an owner holds whose lease
ran out is in doubt when it was on the wire, and anybody's when it waits for its answer. In a file, which only one
execution opens, everything is always ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from enrich.errors import RunEnded
from enrich.ledger.enroll import OPEN_ATTEMPT
from enrich.ledger.process_id import current_process_name, is_gone
from enrich.ledger.queue import QueueTransitions
from enrich.ledger.task_ids import JSON_NUMBERS
from enrich.models import Task, to_json_text

#: A lease that ran out while the server was down goes on: nobody could say that he lived.
_REMAINING_S = (
    "extract(epoch FROM greatest(lease_until, pg_postmaster_start_time() + seconds * interval '1 s') "
    "- clock_timestamp())"
)
_OWN_OWNER_ID = "nullif(current_setting('enrich.owner', true), '')::bigint"


class LeaseHolder(NamedTuple):
    """A process that holds a lease: for how many seconds yet, and until when by the server's clock (seconds)."""

    id: int
    name: str
    is_leader: bool
    remaining_s: float
    expires_at_s: float


class LeaseQueries(QueueTransitions):
    """A ledger that knows who is at what."""

    def recover(self, now_ms: int) -> int:
        """Put what a crash left in `submitting` in doubt (edge d); return how many.

        What another process holds by its lease is none of it; what one held that is gone waits for any poller.
        """
        self.other_holders()
        # What is left is told once: others may end a lease in any moment.
        attempt_rows = self._db.execute(
            "UPDATE attempts SET state = 'in_doubt', settled_ms = ?, error = 'the program ended between the request "
            f"and its answer' WHERE state = 'submitting' AND {OPEN_ATTEMPT} AND {self._db.dialect.not_held_by_others} RETURNING id",
            (now_ms,),
        ).fetchall()
        if attempt_rows:
            self._db.execute(
                "UPDATE requests SET state = 'in_doubt', attempts = attempts + 1, position = NULL "
                f"WHERE state = 'submitting' AND attempt_id IN ({JSON_NUMBERS.format('?')})",
                (to_json_text([number for (number,) in attempt_rows]),),
            )
        return len(attempt_rows)

    def take_over_tasks(self, limit: int | None = None) -> list[Task]:
        """Take on tasks that wait for their answer and that nobody holds, nearest expiry first; return them."""
        if not self._db.dialect.has_leases:
            return self.submitted_tasks()
        unheld = f"state = 'submitted' AND {OPEN_ATTEMPT} AND {self._db.dialect.not_held_by_others} AND owner_id IS DISTINCT FROM {_OWN_OWNER_ID}"
        attempt_rows = self._db.execute(
            f"UPDATE attempts SET owner_id = {_OWN_OWNER_ID} WHERE id IN (SELECT id FROM attempts WHERE {unheld} "
            f"ORDER BY submitted_ms, bundle_id LIMIT ? FOR UPDATE SKIP LOCKED) RETURNING id, bundle_id",
            (limit,),
        ).fetchall()
        if not attempt_rows:
            return []
        attempt_ids = {number for number, _ in attempt_rows}
        if bulk_task_ids := {bundle for _, bundle in attempt_rows if bundle is not None}:
            rows = self._db.execute(
                f"UPDATE attempts SET owner_id = {_OWN_OWNER_ID} WHERE bundle_id = ANY(?) AND {OPEN_ATTEMPT} RETURNING id",
                (sorted(bulk_task_ids),),
            ).fetchall()
            attempt_ids |= {number for (number,) in rows}
        return [task for task in self.submitted_tasks() if attempt_ids.issuperset(task.attempts)]

    def release_tasks(self) -> None:
        """Leave what waits for its answer to other pollers."""
        self._db.execute(
            f"UPDATE attempts SET owner_id = NULL WHERE state = 'submitted' AND {OPEN_ATTEMPT} AND owner_id = {_OWN_OWNER_ID}"
        )

    def other_holders(self) -> list[LeaseHolder]:
        """Return the other processes that may hold something, those that lead an execution first."""
        if not self._db.dialect.has_leases:
            return []
        self._delete_expired_leases()
        rows = self._db.execute(
            f"SELECT id, name, leads, {_REMAINING_S}, extract(epoch FROM lease_until), process FROM owners "
            f"WHERE id IS DISTINCT FROM {_OWN_OWNER_ID} ORDER BY leads DESC, id"
        ).fetchall()
        return [
            LeaseHolder(number, name, leads, float(left_s), float(until))
            for number, name, leads, left_s, until, process in rows
            if not self._delete_lease_if_gone(number, process)
        ]

    def revoke_leases(self, holders: Iterable[LeaseHolder]) -> None:
        """Let none of these renew its lease any more; they find out when they try."""
        owner_ids = [owner.id for owner in holders]
        self._db.execute("UPDATE owners SET seconds = 0 WHERE id = ANY(?)", (owner_ids,))

    def now_ms(self) -> int:
        """Tell what time the server has, in milliseconds since 1970 (UTC)."""
        (now_ms,) = self._db.execute("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint").fetchone()
        return int(now_ms)

    def acquire_lease(self, name: str, seconds: float, *, leader_id: int | None = None) -> int:
        """Become an owner; return its number. Without somebody whom it `follows` it leads an execution.

        Raises LeaderGone when whoever leads is an owner no more: nobody would wait for who begins only now.
        """
        values = (name, current_process_name(), leader_id is None, float(seconds))
        insert = (
            "INSERT INTO owners (name, process, leads, seconds, lease_until) "
            "SELECT ?1, ?2, CAST(?3 AS BOOLEAN), CAST(?4 AS DOUBLE PRECISION), clock_timestamp() + ?4 * interval '1 s'"
        )
        if leader_id is None:
            row = self._db.execute(f"{insert} RETURNING id", values).fetchone()
        else:
            # Its row is kept until ours is there: whoever looks for those who are left sees one of both.
            leader_condition = "FROM owners WHERE id = ?5 AND owners.seconds > 0 FOR KEY SHARE"
            row = self._db.execute(f"{insert} {leader_condition} RETURNING id", (*values, leader_id)).fetchone()
        if row is None:
            raise RunEnded
        return int(row[0])

    def renew_lease(self, owner_id: int) -> bool:
        """Say that an owner lives; return False when its lease was ended."""
        return bool(
            self._db.execute(
                "UPDATE owners SET lease_until = clock_timestamp() + seconds * interval '1 s' "
                "WHERE id = ? AND seconds > 0",
                (owner_id,),
            ).rowcount
        )

    def release_lease(self, owner_id: int) -> None:
        """Be an owner no more: what it held is free at once."""
        self._db.execute("DELETE FROM owners WHERE id = ?", (owner_id,))

    def _delete_expired_leases(self) -> None:
        """End the leases that ran out. Who is in the middle of a transaction lives, whatever its lease says."""
        if self._db.dialect.has_leases:
            self._db.execute(
                f"DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE {_REMAINING_S} <= 0 FOR UPDATE SKIP LOCKED)"
            )

    def _delete_lease_if_gone(self, owner_id: int, process: str) -> bool:
        """End the lease of a process of this machine that is there no more; no need to wait until it runs out.

        Not yet while the server is at a transaction of it.
        """
        return is_gone(process) and bool(
            self._db.execute(
                "DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE id = ? FOR UPDATE SKIP LOCKED)",
                (owner_id,),
            ).rowcount
        )
