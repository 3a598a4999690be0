"""The lock: one writer per ledger, and nothing to clean up after a crash."""

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

from enrich.errors import LedgerLocked, Refused
from enrich.store.lock import hold, is_held

HOLDER = """
import sys, time
from pathlib import Path
from enrich.store.lock import hold
with hold(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def another_process(ledger: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold the lock for so long."""
    command = [sys.executable, "-c", HOLDER, str(ledger), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Name a ledger in a folder that is not there yet."""
    return tmp_path / ".enrich" / "leads.db"


def test_a_held_lock_fails_at_once(ledger: Path) -> None:
    """Without waiting, the error names the ledger and what to do."""
    with another_process(ledger):
        started = time.monotonic()
        with pytest.raises(LedgerLocked, match=r"leads\.db") as locked, hold(ledger, 0):
            pytest.fail("two writers")
        assert time.monotonic() - started < 10

    assert "--if-locked" in str(locked.value.hint)
    assert locked.value.exit_code == 11


def test_the_lock_dies_with_its_process(ledger: Path) -> None:
    """After a power cut or SIGKILL nothing is left to remove."""
    with another_process(ledger) as process:
        process.kill()
        process.wait()
        with hold(ledger, 0):
            pass


@pytest.mark.parametrize("wait_s", [10, -1])
def test_a_lock_can_be_waited_for(ledger: Path, wait_s: float) -> None:
    """It is taken as soon as the other process lets go."""
    with another_process(ledger, 0.3):
        with pytest.raises(LedgerLocked), hold(ledger, 0.05):
            pytest.fail("two writers")
        with hold(ledger, wait_s):
            pass


def test_two_holders_in_one_process_exclude_each_other(ledger: Path) -> None:
    """The lock is of the holder, not of the process; it can be taken again when it was let go."""
    for _ in range(2):
        with hold(ledger, 0), pytest.raises(LedgerLocked), hold(ledger, 0):
            pytest.fail("two writers")


def test_the_lock_file_is_0600_and_stays(ledger: Path) -> None:
    """Removing it would let two processes hold two files of one name."""
    before = os.umask(0)
    try:
        with hold(ledger, 0):
            pass
    finally:
        os.umask(before)

    file = ledger.with_name("leads.db.lock")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_place_without_locks_is_refused(tmp_path: Path) -> None:
    """The message names the file."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "leads.db", Path("/proc/enrich/leads.db")):
        with pytest.raises(Refused, match=r"leads\.db\.lock"), hold(path, 0):
            pytest.fail("held nothing")


def test_a_look_tells_who_is_at_work(tmp_path: Path) -> None:
    """Held or not, looking changes nothing for who holds it, and makes no file."""
    ledger = tmp_path / "ledger.db"
    assert not is_held(ledger)
    assert list(tmp_path.iterdir()) == []
    with hold(ledger, 0):
        assert is_held(ledger)
        with pytest.raises(LedgerLocked), hold(ledger, 0):
            pass
    assert not is_held(ledger)
    with hold(ledger, 0):
        pass
