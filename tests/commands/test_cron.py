"""`enrich cron`: its output can be pasted unchanged for any paths."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.commands.cron import (
    ScheduledJob,
    crontab_line,
    on_calendar,
    parse_days,
    systemd_service,
    systemd_timer,
)
from enrich.commands.options import parse_time_of_day
from enrich.errors import JobError
from tests.support.cases import in_turn
from tests.support.workspace import Workspace, make_leads, serve_api


def make_plan(**changed: object) -> ScheduledJob:
    """Return a plan with plain paths."""
    defaults: dict[str, object] = {
        "name": "leads",
        "command": ["/opt/enrich/bin/enrich"],
        "job": Path("/srv/leads/job.yaml"),
        "log": Path("/srv/leads/job.log"),
        "key_file": Path("/etc/enrich/key"),
        "user": "enrich",
        "hour": 2,
        "minute": 5,
        "max_time": "5h",
        "writable_folders": [Path("/srv/leads")],
    }
    return ScheduledJob(**(defaults | changed))  # type: ignore[arg-type]


def shell_command_of(line: str) -> str:
    r"""Return what cron passes to `sh -c`: the sixth field up to the first bare `%`, with `\%` unescaped.

    Follows cronie's do_command.c character by character.
    """
    command = line.split(" ", 5)[5]
    message, escaped = "", False
    for character in command:
        if escaped:
            message = message[:-1] + character if character == "%" else message + character
            escaped = False
            continue
        if character == "%":
            break
        escaped = character == "\\"
        message += character
    return message


def unit_words(text: str) -> list[str]:
    r"""Split a line of words as systemd does: quotes, backslashes, then `%%` and `$$`."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.quotes = True, "", '"'
    return [word.replace("%%", "%").replace("$$", "$") for word in lexer]


def test_crontab_line() -> None:
    """Quotes only what needs quotes."""
    assert crontab_line(make_plan()) == (
        "5 2 * * * DATABAR_API_KEY_FILE=/etc/enrich/key /opt/enrich/bin/enrich run /srv/leads/job.yaml "
        "--if-locked skip --max-time 5h --log-file /srv/leads/job.log"
    )
    assert crontab_line(make_plan(hour=23, minute=0, days=(1, 5))).startswith("0 23 * * 1,5 ")


PRINTABLE = st.text(
    st.characters(exclude_categories=["C", "Z"], include_characters=" ") | st.sampled_from("%\\'\"$` \t!"[:7]),
    min_size=1,
).filter(str.isprintable)


@settings(deadline=None)
@given(st.lists(PRINTABLE, min_size=3, max_size=3))
def test_crontab_escapes_any_path(names: Sequence[str]) -> None:
    """Escapes percent signs, quotes, backslashes, dollars and spaces in any order."""
    job, log, key = (Path(f"/srv/{name}") for name in names)
    line = crontab_line(make_plan(job=job, log=log, key_file=key))
    key_setting, *words = shlex.split(shell_command_of(line))
    assert key_setting == f"DATABAR_API_KEY_FILE={key}"
    assert (words[2], words[-1]) == (str(job), str(log))
    assert "\n" not in line


@in_turn("name", ["100% sure", r"a\%b", r"\\%%\'", "it's", '"x" $HOME `id` $(id)', "ü; rm -rf x &", "#a"])
def test_shell_parses_crontab_line(name: str) -> None:
    """The crontab line works as cron runs it: `sh -c` with a nearly empty environment."""
    line = crontab_line(make_plan(command=["/usr/bin/printf", "%s\\n"], job=Path(f"/srv/{name}")))
    result = subprocess.run(
        ["/usr/bin/env", "-i", "/bin/sh", "-c", shell_command_of(line)], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[:2] == ["run", f"/srv/{name}"]


@settings(deadline=None)
@given(PRINTABLE, PRINTABLE)
def test_systemd_escapes_any_path(one: str, other: str) -> None:
    """Escapes systemd's specifiers, variables and quotes in any path."""
    job, folder = Path(f"/srv/{one}"), Path(f"/srv/{other}")
    text = systemd_service(make_plan(job=job, writable_folders=[folder, Path("/srv/b")]))
    settings = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))
    assert unit_words(settings["ExecStart"])[2] == str(job)
    assert unit_words(settings["ReadWritePaths"])[0] == str(folder).replace("$$", "$")
    assert not re.search(r"(?<!%)%(?:%%)*(?!%)", settings["ExecStart"])


@in_turn("name", ["a\nb", "a\tb", "a\x00b", "a\u2028b"])
def test_newline_in_path_is_refused(name: str) -> None:
    """Refuses a newline in a path, which would break the crontab line in two."""
    for write in (crontab_line, systemd_service):
        with pytest.raises(JobError, match="cannot be used in a crontab"):
            write(make_plan(job=Path(f"/srv/{name}")))


@in_turn(("text", "time"), [("02:00", (2, 0)), ("2:00", (2, 0)), ("23:59", (23, 59)), ("0:00", (0, 0))])
def test_times_of_day(text: str, time: tuple[int, int]) -> None:
    """Accepts hours and minutes."""
    assert parse_time_of_day(text) == time


@in_turn("text", ["25:00", "24:00", "2", "2:0", "02:60", "2pm", "", "-1:00", "02:00:00", "٠٢:00"])
def test_invalid_times(text: str) -> None:
    """Refuses invalid times, which would never run."""
    with pytest.raises(ValueError, match="must be a time of the day"):
        parse_time_of_day(text)


@in_turn(
    ("text", "days"),
    [
        ("mon-fri", (1, 2, 3, 4, 5)),
        ("Mon,thu", (1, 4)),
        ("fri-mon", (0, 1, 5, 6)),
        ("sunday", (0,)),
        ("mon-sun", ()),
        ("sat, sun", (0, 6)),
    ],
)
def test_weekdays(text: str, days: tuple[int, ...]) -> None:
    """Accepts names, ranges and lists of weekdays; all seven mean every day."""
    assert parse_days(text) == days


@in_turn("text", ["", "m", "mon-", "1-5", "mond", "mon;tue"])
def test_invalid_weekdays(text: str) -> None:
    """Refuses invalid weekdays and names the valid ones."""
    with pytest.raises(ValueError, match="is not a day"):
        parse_days(text)


def test_systemd_calendar() -> None:
    """Writes systemd's calendar for every day or for some days."""
    assert on_calendar(make_plan(minute=0)) == "*-*-* 02:00:00"
    assert on_calendar(make_plan(days=(0, 5))) == "Sun,Fri *-*-* 02:05:00"


def test_private_tmp() -> None:
    """Uses no private /tmp when the job is in /tmp: the unit would not find it."""
    assert "PrivateTmp=true" in systemd_service(make_plan())
    assert "PrivateTmp" not in systemd_service(make_plan(job=Path("/tmp/job.yaml")))  # noqa: S108


# From the command line


@pytest.fixture
def odd_path_workspace(workspace: Workspace) -> Workspace:
    """Make a job in a folder with spaces and special characters in its name, with leads and a key file."""
    folder = workspace.folder / "100% of O'Brien's \"leads\""
    folder.mkdir()
    made = Workspace(folder)
    made.write_job()
    made.write_leads(make_leads(3))
    (folder / "key").write_text("sandbox-key\n", encoding="utf-8")
    (folder / "key").chmod(0o600)
    return made


@pytest.mark.long
def test_crontab_line_runs_job(odd_path_workspace: Workspace, tmp_path: Path) -> None:
    """Runs from another folder with an empty environment, reads the key file and writes the log."""
    with serve_api(tmp_path / "cron-api.db", api_key="sandbox-key") as api:
        printed = odd_path_workspace.run_in_process(
            "cron", "job.yaml", "--crontab", "--key-file", "key", DATABAR_BASE_URL=api.base_url, SSL_CERT_FILE=""
        )
        (line,) = [line for line in printed.stdout.splitlines() if not line.startswith("#")]
        result = subprocess.run(
            ["/usr/bin/env", "-i", "PATH=/usr/bin:/bin", f"HOME={tmp_path}", "/bin/sh", "-c", shell_command_of(line)],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        audit = api.audit()
    assert (printed.exit_code, printed.stderr) == (0, "")
    assert (result.returncode, result.stdout, result.stderr) in [(code, "", result.stderr) for code in (0, 10)]
    assert audit["accepted"] == 3
    assert len(odd_path_workspace.read_output()) == 3
    assert (odd_path_workspace.folder / "job.log").stat().st_size
    assert "sandbox-key" not in printed.stdout


def test_systemd_accepts_units(odd_path_workspace: Workspace, tmp_path: Path) -> None:
    """`systemd-analyze verify` reports nothing, and its calendar accepts the time."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not on this machine")
    units = tmp_path / "units"
    result = odd_path_workspace.run_in_process(
        "cron", "job.yaml", "--at", "2:30", "--days", "mon-fri", "--output-dir", str(units)
    )
    assert (result.exit_code, result.stdout) == (0, "")
    files = sorted(units.iterdir())
    assert [path.name for path in files] == ["enrich-job.service", "enrich-job.timer"]
    verified = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    messages = [line for line in verified.stderr.splitlines() if "enrich-job" in line]
    assert (verified.returncode, messages) == (0, [])
    calendar = subprocess.run(
        [analyze, "calendar", "Mon,Tue,Wed,Thu,Fri *-*-* 02:30:00"], capture_output=True, text=True, check=False
    )
    assert "Normalized form: Mon..Fri *-*-* 02:30:00" in calendar.stdout


def test_paths_are_absolute_without_dots(workspace: Workspace) -> None:
    """Systemd ignores a path with `..` in `LoadCredential` and `ReadWritePaths`; cron starts in another folder."""
    workspace.write_job()
    workspace.write_leads(make_leads(1))
    folder = workspace.folder
    other = Workspace(folder / "other")
    other.folder.mkdir()
    options = ("--key-file", "../key", "--log-file", "../other/../run.log")

    printed = other.run_in_process(
        *("cron", "../job.yaml", *options),
        ENRICH_LEDGER="../l.db",
        SSL_CERT_FILE="c.pem",
        SSL_CERT_DIR="certs:/etc/certs:../more",
    )

    assert printed.exit_code == 0
    assert ".." not in printed.stdout
    for setting in (
        f"LoadCredential=databar_api_key:{folder}/key",
        f"Environment=SSL_CERT_FILE={folder}/other/c.pem",
        f"Environment=SSL_CERT_DIR={folder}/other/certs:/etc/certs:{folder}/more",
        f"Environment=ENRICH_LEDGER={folder}/l.db",
        f"ReadWritePaths={folder}",
    ):
        assert setting in printed.stdout.splitlines()


def test_storage_variables_are_named(odd_path_workspace: Workspace) -> None:
    """For files in object storage, both forms name the variables that a run needs; their values are never printed."""
    comment = "# Add to the environment of the run, for"
    assert comment not in odd_path_workspace.run_in_process("cron", "job.yaml").stdout
    odd_path_workspace.write_job(input="s3://bucket/leads.csv", output="gs://bucket/out.csv")
    for form in ("--crontab", "--systemd"):
        printed = odd_path_workspace.run_in_process(
            "cron", "job.yaml", form, AWS_SECRET_ACCESS_KEY="hush-hush", AWS_REGION="eu-west-9"
        ).stdout
        assert [line for line in printed.splitlines() if line.startswith(comment)] == [
            f"{comment} gs://: GOOGLE_APPLICATION_CREDENTIALS",
            f"{comment} s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
        ]
        assert not re.search("hush-hush|eu-west-9", printed)


def test_existing_units_need_force(odd_path_workspace: Workspace, tmp_path: Path) -> None:
    """Keeps existing units without `--force`: they may have been edited."""
    command = ("cron", "job.yaml", "--output-dir", str(tmp_path))
    assert odd_path_workspace.run_in_process(*command).exit_code == 0
    assert odd_path_workspace.run_in_process(*command).exit_code == 2
    assert odd_path_workspace.run_in_process(*command, "--force").exit_code == 0


def test_crontab_or_systemd_option(odd_path_workspace: Workspace) -> None:
    """Prints both forms by default, or one of them by option."""
    both = odd_path_workspace.run_in_process("cron", "job.yaml").stdout
    line = odd_path_workspace.run_in_process("cron", "job.yaml", "--crontab").stdout
    units = odd_path_workspace.run_in_process("cron", "job.yaml", "--systemd", "--user", "nightly").stdout
    assert line in both
    assert "[Service]" in both
    assert "[Service]" not in line
    assert "User=nightly" in units
    assert "* * *" not in units
    assert "LoadCredential=databar_api_key:" in units
    assert "Environment=DATABAR_API_KEY_FILE=%d/databar_api_key" in units
    assert "Persistent=true" in systemd_timer(make_plan())


@pytest.mark.parametrize(
    "options",
    [
        ("--at", "25:00"),
        ("--days", "someday"),
        ("--max-time", "soon"),
        ("--systemd", "--at", "2"),
        ("--output-dir", ""),
        ("--user", ""),
        ("--user", "nightly\n* * * * * other"),
        ("--user", "nightly;other"),
    ],
)
def test_invalid_options_are_exit_2(odd_path_workspace: Workspace, options: tuple[str, ...]) -> None:
    """Exits with 2 for invalid options and prints nothing."""
    result = odd_path_workspace.run_in_process("cron", "job.yaml", *options)
    assert (result.exit_code, result.stdout) == (2, "")


def test_invalid_job_is_refused(odd_path_workspace: Workspace) -> None:
    """Refuses an invalid job, which would fail every night."""
    odd_path_workspace.write_job(watrfall="x")
    assert odd_path_workspace.run_in_process("cron", "job.yaml").exit_code == 2
