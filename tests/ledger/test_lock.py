"""The lock: one writer per ledger, with nothing to clean up after a crash."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enrich.errors import CommandRefused, LedgerLocked
from enrich.ledger.lock import is_locked, lock_ledger

HOLDER_SCRIPT = """
import sys, time
from pathlib import Path
from enrich.ledger.lock import lock_ledger
with lock_ledger(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def lock_in_other_process(ledger: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock in another process for `seconds`."""
    command = [sys.executable, "-c", HOLDER_SCRIPT, str(ledger), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def ledger_path(tmp_path: Path) -> Path:
    """Return the path of a ledger in a folder that does not exist yet."""
    return tmp_path / ".enrich" / "leads.db"


def test_held_lock_fails_at_once(ledger_path: Path) -> None:
    """A held lock fails at once with an error that names the ledger and what to do."""
    with lock_in_other_process(ledger_path):
        started = time.monotonic()
        with pytest.raises(LedgerLocked, match=r"leads\.db") as locked, lock_ledger(ledger_path, 0):
            pytest.fail("two writers")
        assert time.monotonic() - started < 10

    assert "--watch" in str(locked.value.hint)
    assert locked.value.exit_code == 11


def test_lock_released_by_killed_process(ledger_path: Path) -> None:
    """After SIGKILL or a power cut, there is no lock to remove."""
    with lock_in_other_process(ledger_path) as process:
        process.kill()
        process.wait()
        with lock_ledger(ledger_path, 0):
            pass


@pytest.mark.long
@pytest.mark.parametrize("wait_s", [10, -1])
def test_wait_for_lock(ledger_path: Path, wait_s: float) -> None:
    """Waiting takes the lock as soon as the other process releases it."""
    with lock_in_other_process(ledger_path, 0.3):
        with pytest.raises(LedgerLocked), lock_ledger(ledger_path, 0.05):
            pytest.fail("two writers")
        with lock_ledger(ledger_path, wait_s):
            pass


def test_lock_excludes_within_process(ledger_path: Path) -> None:
    """The lock excludes other holders in the same process, and can be taken again after its release."""
    for _ in range(2):
        with lock_ledger(ledger_path, 0), pytest.raises(LedgerLocked), lock_ledger(ledger_path, 0):
            pytest.fail("two writers")


def test_lock_file_permissions(ledger_path: Path) -> None:
    """The lock file is 0600 and stays: after removing it, two processes could lock two files of one name."""
    before = os.umask(0)
    try:
        with lock_ledger(ledger_path, 0):
            pass
    finally:
        os.umask(before)

    file = ledger_path.with_name("leads.db.lock")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_file_system_without_locks(tmp_path: Path) -> None:
    """The error for a file system without locks names the file."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "leads.db", Path("/proc/enrich/leads.db")):
        with pytest.raises(CommandRefused, match=r"leads\.db\.lock"), lock_ledger(path, 0):
            pytest.fail("held nothing")


def test_lock_inspection_changes_nothing(tmp_path: Path) -> None:
    """Checking the lock changes nothing for its holder and creates no file."""
    ledger = tmp_path / "ledger.db"
    assert not is_locked(ledger)
    assert list(tmp_path.iterdir()) == []
    with lock_ledger(ledger, 0):
        assert is_locked(ledger)
        with pytest.raises(LedgerLocked), lock_ledger(ledger, 0):
            pass
    assert not is_locked(ledger)
    with lock_ledger(ledger, 0):
        pass
