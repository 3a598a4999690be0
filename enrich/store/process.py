"""Names a process so that others on the same machine can tell for sure that it is gone (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
#: When a process began that is there, and may not be looked at (proc(5): "hidepid").
HIDDEN = "hidden"


def myself() -> str:
    """Name this process; '' where the system does not tell enough."""
    machine, number = _machine(), os.getpid()
    began = _began(number)
    return "" if machine is None or began is None else f"{machine} {number} {began}"


def is_gone(name: str) -> bool:
    """Tell whether a process was of this machine, as it runs now, and is there no more."""
    machine, _, rest = name.partition(" ")
    number, _, began = rest.partition(" ")
    return bool(began) and machine == _machine() and _began(int(number)) not in (began, HIDDEN)


def _machine() -> str | None:
    """Name this start of the system, and the space in which its processes have their numbers."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def _began(number: int) -> str | None:
    """Tell when a process began, so that another with its number is not taken for it; None: there is none."""
    try:
        told = (PROC / str(number) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return HIDDEN if _is_there(number) else None
    return None if told[0] == "Z" else told[19]


def _is_there(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True
