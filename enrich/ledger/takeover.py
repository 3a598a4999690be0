"""Leases in the ledger: processes that share a PostgreSQL ledger hold the tasks they send and poll.

A process is an owner. Its lease is valid as long as it renews it. After a lease has expired, the attempts that its
owner was sending become unconfirmed, and any process may take over its tasks that wait for an answer. A SQLite ledger
is used by one run only, so everything in it belongs to that run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from enrich.errors import RunEnded
from enrich.ledger.enroll import OPEN_ATTEMPT
from enrich.ledger.process_id import current_process_name, is_gone
from enrich.ledger.task_ids import JSON_NUMBERS
from enrich.ledger.written_off import WrittenOffQueries
from enrich.models import Task, to_json_text

#: A lease that expired during a server outage is extended: its owner could not renew it.
_REMAINING_S = (
    "extract(epoch FROM greatest(lease_until, pg_postmaster_start_time() + seconds * interval '1 s') "
    "- clock_timestamp())"
)
_OWN_OWNER_ID = "nullif(current_setting('enrich.owner', true), '')::bigint"


class LeaseHolder(NamedTuple):
    """A process with a lease: the remaining seconds, and the expiry as seconds since 1970 by the server's clock."""

    id: int
    name: str
    is_leader: bool
    remaining_s: float
    expires_at_s: float


class LeaseQueries(WrittenOffQueries):
    """A ledger with queries for leases and takeover."""

    def recover(self, now_ms: int) -> int:
        """Mark attempts that a crash left in `submitting` as `in_doubt` (edge d). Return how many.

        Attempts that another process holds by its lease are left alone. Tasks of an expired lease wait for any poller.
        """
        self.other_holders()
        # Use RETURNING: leases may change between two statements.
        attempt_rows = self._db.execute(
            "UPDATE attempts SET state = 'in_doubt', settled_ms = ?, error = 'the program ended between the request "
            f"and its answer' WHERE state = 'submitting' AND {OPEN_ATTEMPT} "
            f"AND {self._db.dialect.not_held_by_others} RETURNING id",
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
        """Take over up to `limit` waiting tasks that no process holds, nearest expiry first; return them."""
        if not self._db.dialect.has_leases:
            return self.submitted_tasks()
        unheld = (
            f"state = 'submitted' AND {OPEN_ATTEMPT} AND {self._db.dialect.not_held_by_others} "
            f"AND owner_id IS DISTINCT FROM {_OWN_OWNER_ID}"
        )
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
                f"UPDATE attempts SET owner_id = {_OWN_OWNER_ID} WHERE bundle_id = ANY(?) AND {OPEN_ATTEMPT} "
                "RETURNING id",
                (sorted(bulk_task_ids),),
            ).fetchall()
            attempt_ids |= {number for (number,) in rows}
        return [task for task in self.submitted_tasks() if attempt_ids.issuperset(task.attempts)]

    def release_tasks(self) -> None:
        """Release our tasks that wait for an answer, so that other processes can poll them."""
        self._db.execute(
            f"UPDATE attempts SET owner_id = NULL WHERE state = 'submitted' AND {OPEN_ATTEMPT} "
            f"AND owner_id = {_OWN_OWNER_ID}"
        )

    def other_holders(self) -> list[LeaseHolder]:
        """Return the other processes that may hold tasks, leaders of a run first."""
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
        """Keep these processes from renewing their leases. They notice at the next attempt."""
        owner_ids = [owner.id for owner in holders]
        self._db.execute("UPDATE owners SET seconds = 0 WHERE id = ANY(?)", (owner_ids,))

    def now_ms(self) -> int:
        """Return the server's time in milliseconds since 1970 (UTC)."""
        (now_ms,) = self._db.execute("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint").fetchone()
        return int(now_ms)

    def acquire_lease(self, name: str, seconds: float, *, leader_id: int | None = None) -> int:
        """Acquire a lease of `seconds` and return the owner id. Without a `leader_id` the owner leads a run.

        Raises RunEnded when the leader is not an owner any more: it would not wait for a process that starts only now.
        """
        values = (name, current_process_name(), leader_id is None, float(seconds))
        insert = (
            "INSERT INTO owners (name, process, leads, seconds, lease_until) "
            "SELECT ?1, ?2, CAST(?3 AS BOOLEAN), CAST(?4 AS DOUBLE PRECISION), clock_timestamp() + ?4 * interval '1 s'"
        )
        if leader_id is None:
            row = self._db.execute(f"{insert} RETURNING id", values).fetchone()
        else:
            # The leader's row stays locked until ours is inserted: a search for other owners sees one of the two.
            leader_condition = "FROM owners WHERE id = ?5 AND owners.seconds > 0 FOR KEY SHARE"
            row = self._db.execute(f"{insert} {leader_condition} RETURNING id", (*values, leader_id)).fetchone()
        if row is None:
            raise RunEnded
        return int(row[0])

    def renew_lease(self, owner_id: int) -> bool:
        """Renew an owner's lease. Return False when the lease has ended."""
        return bool(
            self._db.execute(
                "UPDATE owners SET lease_until = clock_timestamp() + seconds * interval '1 s' "
                "WHERE id = ? AND seconds > 0",
                (owner_id,),
            ).rowcount
        )

    def release_lease(self, owner_id: int) -> None:
        """Delete an owner's lease. Its tasks are free at once."""
        self._db.execute("DELETE FROM owners WHERE id = ?", (owner_id,))

    def _delete_expired_leases(self) -> None:
        """Delete expired leases. The owner of an open transaction is alive, so its lease stays."""
        if self._db.dialect.has_leases:
            self._db.execute(
                "DELETE FROM owners WHERE id IN "
                f"(SELECT id FROM owners WHERE {_REMAINING_S} <= 0 FOR UPDATE SKIP LOCKED)"
            )

    def _delete_lease_if_gone(self, owner_id: int, process: str) -> bool:
        """Delete the lease of an ended process of this machine before it expires; return whether it was deleted.

        It stays while the server is still executing a transaction of that process.
        """
        return is_gone(process) and bool(
            self._db.execute(
                "DELETE FROM owners WHERE id IN (SELECT id FROM owners WHERE id = ? FOR UPDATE SKIP LOCKED)",
                (owner_id,),
            ).rowcount
        )
