"""A clock that steps by hours: what the launcher does, and that no run is led astray by it, nor by a wrong `Date`."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import pytest

from tests.harness import Api, Office, people, serving, until
from tests.own_answers import ANSWERS
from tests.stepping_clock import SteppingClock, start_by_clock

LEADS = 8
HOURS = pytest.mark.parametrize("hours", [30, 2, -2, -30])


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


@pytest.mark.long
def test_the_program_runs_under_it(api: Api, office: Office) -> None:
    """The ledger's times are the clock's, if it is off by little; arguments and exit code pass through."""
    office.write_leads(people(3))
    (office.folder / "clock").write_text("-240")
    process = start_by_clock(office, api, office.folder / "clock")
    process.communicate(timeout=60)
    assert process.returncode == 0
    (began,) = office.sql("SELECT min(claimed_ms) FROM attempts")[0]
    assert time.time() - 300 < began / 1000 < time.time() - 200
    process = start_by_clock(office, api, office.folder / "clock", "--nonsense")
    process.communicate(timeout=60)
    assert process.returncode == 2


def submitted(office: Office) -> int:
    """Count the tasks that ever had an id."""
    if not office.ledger_path.exists():
        return 0
    try:
        (count,) = office.sql("SELECT count(*) FROM attempts WHERE task_id IS NOT NULL")[0]
    except sqlite3.OperationalError:  # its tables are being made
        return 0
    return int(count)


def ends_well(office: Office, api: Api, hours: float | None, *options: str) -> dict[str, object]:
    """Run the job, stepping the clock once all is submitted, if by any hours; every lead must get its answer."""
    clock = office.folder / "clock"
    process = start_by_clock(office, api, clock, *options)
    if hours is not None:
        until(lambda: submitted(office) == LEADS, 60)
        clock.write_text(str(hours * 3600))
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert {row["enrich_status"] for row in office.output()} <= ANSWERS
    receipt: dict[str, object] = json.loads(out)
    return receipt


@pytest.mark.long
@HOURS
def test_a_step_while_tasks_run_and_flicker(tmp_path: Path, office: Office, hours: float) -> None:
    """A task that is not known for some seconds is no older for a clock that stepped, and patience is no shorter."""
    office.write_leads(people(LEADS))
    with serving(tmp_path / "api.db", latency="fixed(3)") as api:
        api.fault("flickering-task", LEADS, "post", seconds=4)
        ends_well(office, api, hours)
        assert api.audit()["accepted"] == LEADS


@pytest.mark.long
@HOURS
def test_a_step_between_two_runs(tmp_path: Path, office: Office, hours: float) -> None:
    """What an earlier run left is fetched, though it seems to be of tomorrow, or long gone, and flickers."""
    office.write_leads(people(LEADS))
    with serving(tmp_path / "api.db", latency="fixed(6)") as api:
        api.fault("flickering-task", LEADS, "post", seconds=3)
        office.leave_at_the_api(api)
        (office.folder / "clock").write_text(str(hours * 3600))
        assert ends_well(office, api, None)["submitted"] == 0


@pytest.mark.long
@pytest.mark.parametrize("age", [0, 93_600])
@pytest.mark.parametrize("hours", [26, -26])
def test_a_wrong_date_now_and_then(tmp_path: Path, office: Office, hours: int, age: int) -> None:
    """An answer with a wrong `Date`, alone or of a cache with its age, writes no task off that flickers."""
    office.write_leads(people(LEADS))
    with serving(tmp_path / "api.db", latency="fixed(2)") as api:
        api.fault("flickering-task", LEADS, "post", seconds=3)
        api.fault("wrong-date", LEADS // 2, "get", seconds=hours * 3600, age=age)
        ends_well(office, api, None)
        assert api.audit()["accepted"] == LEADS


@pytest.mark.long
def test_a_step_under_retry_after(tmp_path: Path, office: Office) -> None:
    """A `Retry-After` date is measured by the clock of the answer that has it, not by ours."""
    office.write_leads(people(LEADS))
    (office.folder / "clock").write_text(str(-7 * 3600))
    with serving(tmp_path / "api.db", latency="fixed(1)") as api:
        api.fault("rate-limit-date", 2, "post", retry_after=1)
        elapsed = ends_well(office, api, None)["elapsed_s"]
        assert isinstance(elapsed, float)
        assert elapsed < 60
