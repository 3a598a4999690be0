"""Names a process so that others on the same machine can tell for sure that it is gone (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
#: When a process began that is there, and may not be looked at (proc(5): "hidepid").
HIDDEN_START_TIME = "hidden"


def current_process_name() -> str:
    """Name this process; '' where the system does not tell enough."""
    machine, pid = _boot_and_namespace(), os.getpid()
    start_time = _process_start_time(pid)
    return "" if machine is None or start_time is None else f"{machine} {pid} {start_time}"


def is_gone(name: str) -> bool:
    """Tell whether a process was of this machine, as it runs now, and is there no more."""
    machine, _, rest = name.partition(" ")
    pid, _, start_time = rest.partition(" ")
    return (
        bool(start_time)
        and machine == _boot_and_namespace()
        and _process_start_time(int(pid)) not in (start_time, HIDDEN_START_TIME)
    )


def _boot_and_namespace() -> str | None:
    """Name this start of the system, and the space in which its processes have their numbers."""
    try:
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot_id}/{(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def _process_start_time(pid: int) -> str | None:
    """Tell when a process began, so that another with its number is not taken for it; None: there is none."""
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
        pass  # another user's
    return True
