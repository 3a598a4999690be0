"""The doctor's checks as functions of the facts: clock, credits, expiry, file names, mounts."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.commands import doctor_checks as checks
from enrich.commands.cron import parse_env_lines
from enrich.commands.doctor_checks import (
    Finding,
    file_name_encoding,
    file_system_type,
    format_findings,
    is_accessible_by_others,
    is_network_file_system,
    startup_error,
)
from enrich.ledger.records import ExecutionRow
from enrich.models import MICROS_PER_CREDIT
from tests.support.cases import in_turn

NOW = datetime(2026, 11, 23, 20, 0, tzinfo=UTC)
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:27 / /mnt/nas rw,relatime shared:2 master:1 - nfs4 nas:/volume rw,vers=4.2
31 30 8:17 / /mnt/nas/local rw - xfs /dev/sdb1 rw
32 22 0:40 / /mnt/with\\040blank rw - cifs //nas/share rw
33 22 0:41 / /mnt/keys rw - fuse.sshfs me@host:/ rw
34 22 0:42 / /mnt/twice rw - nfs nas:/old rw
35 22 8:33 / /mnt/twice rw - ext4 /dev/sdc1 rw
nonsense
"""


@in_turn(
    ("path", "kind", "network"),
    [
        ("/srv/leads", "ext4", False),
        ("/mnt/nas/leads/.enrich/leads.db", "nfs4", True),
        ("/mnt/nas", "nfs4", True),
        ("/mnt/nasty", "ext4", False),
        ("/mnt/nas/local/leads.db", "xfs", False),
        ("/mnt/with blank/leads.db", "cifs", True),
        ("/mnt/keys/x", "fuse.sshfs", True),
        ("/mnt/twice/x", "ext4", False),
    ],
)
def test_file_system_of_path(path: str, kind: str, network: bool) -> None:  # noqa: FBT001 - a table
    """Uses the nearest mount, and the last one of several at the same place."""
    assert file_system_type(MOUNTS, Path(path)) == kind
    assert is_network_file_system(kind) is network


@in_turn("kind", ["smb3", "smbfs", "nfs", "9p", "fuse.rclone", "fuse.s3fs", "ceph"])
def test_network_file_systems(kind: str) -> None:
    """Detects network file systems, where SQLite's locks are unreliable."""
    assert is_network_file_system(kind)


@in_turn("kind", ["btrfs", "overlay", "tmpfs", "fuseblk", "fuse.lxcfs", "apfs", None])
def test_local_file_systems(kind: str | None) -> None:
    """Does not warn about local file systems."""
    assert not is_network_file_system(kind)


@settings(deadline=None)
@given(st.text())
def test_malformed_mountinfo(text: str) -> None:
    """Accepts any text in mountinfo: other kernels may write it differently."""
    file_system_type(text, Path("/srv"))
    file_system_type(f"1 2 3 / / {text} - ext4", Path("/srv"))


def test_missing_mountinfo() -> None:
    """Accepts a missing mountinfo on systems other than Linux."""
    assert file_system_type("", Path("/srv")) is None


def test_environment_file_syntax() -> None:
    """Reads comments, quotes and `export`; nothing else."""
    text = "# for cron\n\nexport A=1\nB='two words' # why\nC=\"x=y\"\nD=\n"
    assert parse_env_lines(text.splitlines()) == {"A": "1", "B": "two words", "C": "x=y", "D": ""}
    for invalid in ("A", "1A=2", "A = 2", "A='2"):
        with pytest.raises(ValueError, match="line 2: "):
            parse_env_lines(["X=1", invalid])


def test_program_start_errors(tmp_path: Path) -> None:
    """Reports why the program does not start, in its own words or the system's."""
    assert startup_error([sys.executable, "-m", "enrich"], {}) is None
    assert "No such file" in (startup_error([str(tmp_path / "enrich")], {}) or "")
    assert "no_such_module" in (startup_error([sys.executable, "-m", "no_such_module"], {}) or "")


def test_python_encoding_detection() -> None:
    """An empty environment means UTF-8 unless the variables rule it out."""
    assert file_name_encoding({}) == "utf-8"
    assert file_name_encoding({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}) == "ascii"


def test_file_permissions(tmp_path: Path) -> None:
    """Reports access for group and others."""
    key = tmp_path / "key"
    key.touch(mode=0o600)
    assert not is_accessible_by_others(key)
    for mode in (0o640, 0o604, 0o620):
        key.chmod(mode)
        assert is_accessible_by_others(key)


@in_turn(
    ("ahead_s", "mark", "message"),
    [
        (None, "ok", "no time"),
        (0.0, "ok", "agrees"),
        (-299.0, "ok", "agrees"),
        (301.0, "warn", "0:05:01 behind the API's"),
        (-7200.0, "warn", "2:00:00 ahead of the API's"),
    ],
)
def test_clock_offset_finding(ahead_s: float | None, mark: str, message: str) -> None:
    """Reports an offset of more than five minutes with its direction."""
    finding = checks.check_clock(ahead_s)
    assert finding.mark == mark
    assert message in finding.message


@in_turn(
    ("credits_", "last", "mark", "code"),
    [
        ((None, 10, 5), [1], "ok", 0),
        ((100, None, 5), [50], "ok", 0),
        ((100, 100, None), [], "ok", 0),
        ((99, 100, None), [], "fail", 5),
        ((4, None, 5), [], "fail", 5),
        ((104, 100, 5), [], "fail", 5),
        ((40, None, 5), [10, 50], "warn", 0),
        ((140, 100, 5), [50], "warn", 0),
    ],
)
def test_balance_findings(credits_: tuple[int | None, ...], last: list[int], mark: str, code: int) -> None:
    """Compares the balance with the minimum balance, one request's maximum price, and a past run's spend."""
    balance, min_balance, max_price = (None if each is None else each * MICROS_PER_CREDIT for each in credits_)
    finding = checks.check_balance(balance, min_balance, max_price, [each * MICROS_PER_CREDIT for each in last])
    assert (finding.mark, finding.exit_code) == (mark, code)


@in_turn(
    ("cap", "max_price", "runs", "mark", "code"),
    [
        (None, 5, [], "warn", 0),
        (100, 5, [], "ok", 0),
        (100, 5, [(0, 99), (10, 20)], "ok", 0),
        (100, 5, [(0, 120)], "warn", 0),
        (100, 5, [(0, 1), (12, 98)], "warn", 0),
        (4, 5, [], "fail", 12),
    ],
)
def test_cap_findings(cap: int | None, max_price: int, runs: list[tuple[int, int]], mark: str, code: int) -> None:
    """Warns about a cap below one request's price, below the last runs' spend, or missing."""
    rows = [
        ExecutionRow(1, "job", 0, 1, exit_code, None, 0, spent * MICROS_PER_CREDIT, 0, 0, None, None, None, None)
        for exit_code, spent in runs
    ]
    finding = checks.check_cap(None if cap is None else cap * MICROS_PER_CREDIT, max_price * MICROS_PER_CREDIT, rows)
    assert (finding.mark, finding.exit_code) == (mark, code)


def test_expiring_results_finding() -> None:
    """Reports how many results have expired already."""
    hour = 3_600_000
    submitted = [-30 * hour, -20 * hour, -1 * hour]
    finding = checks.check_expiring_results(submitted, 24 * hour, 0, 6 * hour)
    assert finding.mark == "warn"
    assert "3 paid requests running at Databar, 2 expire" in finding.message
    assert "1 of them have probably expired" in finding.message
    assert checks.check_expiring_results([-hour], 24 * hour, 0, 6 * hour).mark == "ok"
    assert checks.check_expiring_results([], 24 * hour, 0, 6 * hour).mark == "ok"


def test_old_input_finding() -> None:
    """Warns after two days."""
    day = 86_400
    assert checks.check_input_age(0, day).mark == "ok"
    old = checks.check_input_age(0, 5 * day)
    assert (old.mark, old.message, old.remedy) == ("warn", "unchanged for 5 days", "check that the export still runs")


@in_turn(
    ("name", "mark", "message"),
    [
        ("out.csv", "ok", "each run replaces"),
        ("out-%Y-%m-%d.csv", "ok", "each day has its own file"),
        ("out-%H%M.csv", "ok", "each run replaces"),
        ("out-%A.csv", "warn", "after 7 days"),
        ("out-%d.csv", "warn", "repeats after 30 days"),
        ("out-%m-%d.csv", "warn", "repeats after 365 days"),
    ],
)
def test_repeating_output_names_finding(name: str, mark: str, message: str) -> None:
    """Warns about date codes that repeat after some days and so replace an older output."""
    finding = checks.check_output_names(lambda now: Path(now.strftime(name)), NOW, {})
    assert finding.mark == mark
    assert message in finding.message


def test_output_name_clash_finding() -> None:
    """Reports an output name that the run would refuse on a later day."""
    finding = checks.check_output_names(
        lambda now: Path(now.strftime("leads-%d.csv")), NOW, {Path("leads-30.csv"): "the input"}
    )
    assert (finding.mark, finding.exit_code) == ("fail", 2)
    assert "in 7 days" in finding.message


@in_turn(("free", "mark"), [(99, "fail"), (100, "warn"), (149, "warn"), (150, "ok")])
def test_disk_space_finding(free: int, mark: str) -> None:
    """The output's size is certain; the ledger's growth is an estimate."""
    assert checks.check_free_space(Path("/srv"), free, 100, 50).mark == mark


def test_next_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns a time later today or tomorrow, also in the night in which the clock changes."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        evening = datetime(2026, 11, 23, 20, 0).astimezone()
        assert checks.next_run_time(evening, 22, 30) == evening + timedelta(hours=2, minutes=30)
        assert checks.next_run_time(evening, 2, 0) == evening + timedelta(hours=6)
        assert checks.next_run_time(evening, 20, 0) == evening + timedelta(days=1)
        before_summer = datetime(2026, 3, 28, 20, 0).astimezone()
        assert checks.next_run_time(before_summer, 4, 0) == before_summer + timedelta(hours=7)
    time.tzset()


def test_findings_are_sorted() -> None:
    """Prints failures, then warnings, then the rest, each on one line, its remedy below it, and their number."""
    findings = [Finding("ok", "api", "reached"), Finding("warn", "job", "a\nb", "c\nd"), Finding("fail", "key", "none")]

    assert list(format_findings(findings)) == [
        "fail  key          none",
        "warn  job          a b",
        "                   → c",
        "                     d",
        "ok    api          reached",
        "1 failure, 1 warning",
    ]
    assert list(format_findings(findings[:1])) == ["ok    api          reached", "No problems found"]
