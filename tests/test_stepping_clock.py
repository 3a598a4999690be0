"""The launcher with a clock that steps: it moves what the program sees, and is the program otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.harness import Api, Office, people
from tests.stepping_clock import CLOCK, SteppingClock

ROOT = Path(__file__).parent.parent


def test_it_steps_both_ways_while_it_runs(tmp_path: Path) -> None:
    """The time is off by what the file says now; without a file it is right."""
    path = tmp_path / "clock"
    clock = SteppingClock(path)
    assert abs(clock.time() - time.time()) < 60
    for hours in (5, -30, 0):
        path.write_text(str(hours * 3600))
        clock._read_at = float("-inf")
        assert abs(clock.time() - time.time() - hours * 3600) < 60
        assert abs(clock.time_ns() - time.time_ns() - hours * 3600 * 10**9) < 60 * 10**9
    path.write_text("")
    clock._read_at = float("-inf")
    assert abs(clock.time() - time.time()) < 60


def test_the_program_runs_under_it(api: Api, office: Office) -> None:
    """The ledger's times are the clock's, if it is off by little; arguments and exit code pass through."""
    office.write_leads(people(3))
    (office.folder / "clock").write_text("-240")
    environ = office.variables(api) | {CLOCK: str(office.folder / "clock"), "PYTHONPATH": str(ROOT)}

    def code(*arguments: str) -> int:
        command = [sys.executable, "-m", "tests.stepping_clock", *arguments]
        return subprocess.run(command, cwd=office.folder, env=environ, capture_output=True, check=False).returncode

    assert code("run", "job.yaml", "--json") == 0
    (began,) = office.sql("SELECT min(claimed_ms) FROM attempts")[0]
    assert time.time() - 300 < began / 1000 < time.time() - 200
    assert code("nonsense") == 2
    assert os.environ.get(CLOCK) is None
