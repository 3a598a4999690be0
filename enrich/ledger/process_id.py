"""Names a process so that other processes on the same machine can detect reliably that it has ended (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
#: Start time of a process that exists but cannot be read (proc(5): "hidepid").
HIDDEN_START_TIME = "hidden"


def current_process_name() -> str:
    """Return a name for this process. Empty when the system does not provide enough information."""
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
        stat_fields = (
            (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return HIDDEN_START_TIME if _pid_exists(pid) else None
    return None if stat_fields[0] == "Z" else stat_fields[19]


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to another user
    return True
