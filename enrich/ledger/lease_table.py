"""The leases in a PostgreSQL ledger (`leases`): one row for each process, valid as long as it renews it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from enrich.errors import LedgerLocked, RunEnded
from enrich.ledger.database import Database

#: A lease that expired during a server outage is extended: its holder could not renew it.
_REMAINING_S = (
    "extract(epoch FROM greatest(lease_until, pg_postmaster_start_time() + seconds * interval '1 s') "
    "- clock_timestamp())"
)

OWN_LEASE_ID = "nullif(current_setting('enrich.lease', true), '')::bigint"


class LeaseHolder(NamedTuple):
    """A process with a lease: the remaining seconds, and the expiry as seconds since 1970 by the server's clock."""

    id: int
    name: str
    is_leader: bool
    remaining_s: float
    expires_at_s: float


def other_holders(db: Database) -> list[LeaseHolder]:
    """Return the other processes that may hold tasks, leaders of a run first."""
    if not db.dialect.has_leases:
        return []
    # The holder of an open transaction is alive, so its lease stays.
    db.execute(
        f"DELETE FROM leases WHERE id IN (SELECT id FROM leases WHERE {_REMAINING_S} <= 0 FOR UPDATE SKIP LOCKED)"
    )
    rows = db.execute(
        f"SELECT id, name, leads, {_REMAINING_S}, extract(epoch FROM lease_until), process FROM leases "
        f"WHERE id IS DISTINCT FROM {OWN_LEASE_ID} ORDER BY leads DESC, id"
    ).fetchall()
    delete = "DELETE FROM leases WHERE id IN (SELECT id FROM leases WHERE id = ? FOR UPDATE SKIP LOCKED)"
    holders = []
    for number, name, leads, left_s, until, process in rows:
        # The lease of a process that has ended stays while the server is still executing a transaction of it.
        if not is_gone(process) or not db.execute(delete, (number,)).rowcount:
            holders.append(LeaseHolder(number, name, leads, float(left_s), float(until)))
    return holders


def check_no_other_holders(db: Database) -> None:
    """Raise LedgerLocked while processes of an earlier run may hold tasks. A worker may outlive its run."""
    if others := other_holders(db):
        names = ", ".join(other.name for other in others)
        raise LedgerLocked(
            f"{db.location}: processes of an earlier run have not ended yet: {names}", "try again in a minute"
        )


def revoke_leases(db: Database, holders: Iterable[LeaseHolder]) -> None:
    """Keep these processes from renewing their leases. They notice at the next attempt."""
    lease_ids = [holder.id for holder in holders]
    db.execute("UPDATE leases SET seconds = 0 WHERE id = ANY(?)", (lease_ids,))


def now_ms(db: Database) -> int:
    """Return the server's time in milliseconds since 1970 (UTC)."""
    return db.number("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint")


def count_workers(db: Database, lease_id: int, since_ms: int) -> tuple[int, int]:
    """Count the leases of workers, and those of them but `lease_id` that were not renewed since a time."""
    workers, not_renewed = db.execute(
        "SELECT count(*), count(*) FILTER (WHERE id <> ?1 AND (seconds = 0 OR "
        "lease_until <= to_timestamp(CAST(?2 AS DOUBLE PRECISION) / 1000) + seconds * interval '1 s')) "
        "FROM leases WHERE NOT leads",
        (lease_id, since_ms),
    ).fetchone()
    return int(workers), int(not_renewed)


def acquire_lease(db: Database, name: str, seconds: float, *, leader_id: int | None = None) -> int:
    """Acquire a lease of `seconds` and return its id. Without a `leader_id` its holder leads a run.

    Raises RunEnded when the lease of the leader has ended: it would not wait for a process that starts only now.
    """
    values = (name, current_process_name(), leader_id is None, float(seconds))
    insert = (
        "INSERT INTO leases (name, process, leads, seconds, lease_until) "
        "SELECT ?1, ?2, CAST(?3 AS BOOLEAN), CAST(?4 AS DOUBLE PRECISION), clock_timestamp() + ?4 * interval '1 s'"
    )
    if leader_id is None:
        row = db.execute(f"{insert} RETURNING id", values).fetchone()
    else:
        # The leader's row stays locked until ours is inserted: a search for other leases sees one of the two.
        leader_condition = "FROM leases WHERE id = ?5 AND leases.seconds > 0 FOR KEY SHARE"
        row = db.execute(f"{insert} {leader_condition} RETURNING id", (*values, leader_id)).fetchone()
    if row is None:
        raise RunEnded
    return int(row[0])


def renew_lease(db: Database, lease_id: int) -> bool:
    """Renew a lease. Return False when the lease has ended."""
    renew = "UPDATE leases SET lease_until = clock_timestamp() + seconds * interval '1 s' WHERE id = ? AND seconds > 0"
    return db.execute(renew, (lease_id,)).rowcount > 0


def release_lease(db: Database, lease_id: int) -> None:
    """Delete a lease. Its tasks are free at once."""
    db.execute("DELETE FROM leases WHERE id = ?", (lease_id,))


PROC = Path("/proc")
#: Start time of a process that exists but cannot be read (proc(5): "hidepid").
HIDDEN_START_TIME = "hidden"


def current_process_name() -> str:
    """Return a name by which other processes of this machine can detect that this one has ended (proc(5)).

    Empty when the system does not provide enough information.
    """
    machine, pid = _boot_and_namespace(), os.getpid()
    start_time = _process_start_time(pid)
    return "" if machine is None or start_time is None else f"{machine} {pid} {start_time}"


def is_gone(name: str) -> bool:
    """Return whether the process ran on this machine, since its last boot, and has ended."""
    machine, _, rest = name.partition(" ")
    pid, _, start_time = rest.partition(" ")
    return (
        bool(start_time)
        and machine == _boot_and_namespace()
        and _process_start_time(int(pid)) not in (start_time, HIDDEN_START_TIME)
    )


def _boot_and_namespace() -> str | None:
    """Return the boot id of the system and the PID namespace. None: not available."""
    try:
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot_id}/{(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def _process_start_time(pid: int) -> str | None:
    """Return the start time of a process, to distinguish it from a later one with the same PID. None: no process."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return HIDDEN_START_TIME if _pid_exists(pid) else None
    stat_fields = text.rpartition(")")[2].split()
    return None if stat_fields[0] == "Z" else stat_fields[19]


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to another user
    return True
