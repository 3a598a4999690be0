"""`enrich doctor`: what will go wrong tonight, seen with the eyes of cron."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from enrich.store.ledger import Ledger
from enrich.store.lock import hold
from tests.cases import first_quick
from tests.harness import AWAY, Api, Done, Office, people, serving


@pytest.fixture
def ready(office: Office, api: Api) -> Office:
    """An office whose nights will be good."""
    office.write_leads(people(3))
    office.write_job(limits="{max_credits: 50}")
    key = office.folder / "key"
    key.write_text(api.api_key, encoding="utf-8")
    key.chmod(0o600)
    return office


def doctor(office: Office, api: Api, *more: str, beside: dict[str, str] | None = None) -> Done:
    """Ask the doctor, with what the crontab sets; `beside` is set in the shell alone."""
    env = {"HOME": str(office.folder), "DATABAR_BASE_URL": api.base_url}
    env["DATABAR_API_KEY_FILE"] = str(office.folder / "key")
    given = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
    return office.command("doctor", "job.yaml", *given, *more, api=None, **(beside or {}))


def findings(done: Done, mark: str) -> dict[str, str]:
    """The lines with a mark, by their subject."""
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return {subject: said for found, subject, said in lines if found == mark}


def test_a_good_job_has_nothing_to_fear(ready: Office, api: Api) -> None:
    """All marks are ok; nothing is written, nothing is paid."""
    before = {path: path.stat().st_mtime_ns for path in ready.folder.rglob("*")}
    done = doctor(ready, api)

    assert (done.code, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
    assert {"key", "api", "clock", "job", "ledger", "disk", "balance", "program"} <= findings(done, "ok").keys()
    assert {path: path.stat().st_mtime_ns for path in ready.folder.rglob("*")} == before
    assert api.audit()["accepted"] == 0


def test_after_good_nights_too(ready: Office, api: Api) -> None:
    """The ledger is looked into, and is as it was."""
    assert ready.command("run", "job.yaml", api=api).code == 0
    before = ready.ledger_path.read_bytes()
    done = doctor(ready, api)
    assert done.code == 0
    assert "3 requests in" in findings(done, "ok")["ledger"]
    assert ready.ledger_path.read_bytes() == before
    assert api.audit()["accepted"] == 3


def test_a_key_of_the_shell_is_not_crons(ready: Office, api: Api) -> None:
    """The classic: it works by hand and never at night."""
    done = ready.command("doctor", "job.yaml", "--env", f"HOME={ready.folder}", "--offline", api=api)
    assert done.code == 3
    assert "DATABAR_API_KEY is set in this shell only: cron will not have it" in findings(done, "fail")["key"]
    assert "DATABAR_BASE_URL is set in this shell only" in findings(done, "warn")["api"]
    assert api.api_key not in done.stdout


def test_the_environment_may_come_from_a_file(ready: Office, api: Api) -> None:
    """As systemd's EnvironmentFile."""
    text = f"# cron\nDATABAR_BASE_URL={api.base_url}\nDATABAR_API_KEY_FILE='{ready.folder}/key'\nHOME=/nowhere\n"
    (ready.folder / "env").write_text(text, encoding="utf-8")
    assert ready.command("doctor", "job.yaml", "--env-file", "env").code == 0
    (ready.folder / "env").write_text("nonsense", encoding="utf-8")
    assert ready.command("doctor", "job.yaml", "--env-file", "env").code == 2
    assert ready.command("doctor", "job.yaml", "--env", "nonsense").code == 2


@pytest.mark.long
@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://p.example"), ("SSL_CERT_FILE", "/nowhere")])
def test_a_way_that_cron_cannot_take(ready: Office, api: Api, name: str, value: str) -> None:
    """Exit 2, as the run; what only the shell has is no hindrance, but is told."""
    way = ["--env", "DATABAR_BASE_URL=https://api.example/v1", "--env", f"{name}={value}", "--offline"]
    done = doctor(ready, api, *way)
    assert done.code == 2
    assert findings(done, "fail")["api"].startswith(f"{name}: ")
    done = doctor(ready, api, beside={name: value})
    assert done.code == 0
    assert f"{name} is set in this shell only" in findings(done, "warn")["api"]


def test_no_key_at_all(ready: Office) -> None:
    """Exit 3, as the run."""
    done = ready.command("doctor", "job.yaml", "--env", f"HOME={ready.folder}")
    assert done.code == 3
    assert "no API key" in findings(done, "fail")["key"]


def test_a_key_that_the_api_refuses(ready: Office, api: Api) -> None:
    """Exit 3; offline nobody can tell."""
    (ready.folder / "key").write_text("old", encoding="utf-8")
    assert doctor(ready, api).code == 3
    assert doctor(ready, api, "--offline").code == 0


def test_a_key_that_others_may_read(ready: Office, api: Api) -> None:
    """A warning with its remedy."""
    (ready.folder / "key").chmod(0o644)
    done = doctor(ready, api)
    assert done.code == 0
    assert findings(done, "warn")["key"].endswith(f"chmod 600 {ready.folder}/key")


def test_an_api_that_is_away(ready: Office) -> None:
    """Exit 4."""
    away = Api("http://127.0.0.1:9/v1", "key")
    with patch("enrich.setup.online.Timing", lambda: AWAY):
        done = doctor(ready, away)
    assert done.code == 4
    assert "unreachable" in findings(done, "fail")["api"]


def test_a_job_that_is_wrong(ready: Office, api: Api) -> None:
    """Exit 2, and the key is looked at all the same."""
    ready.write_job(watrfall="x")
    done = doctor(ready, api)
    assert done.code == 2
    assert "watrfall" in findings(done, "fail")["job"]
    assert "key" in findings(done, "ok")


@pytest.mark.parametrize(
    ("changed", "said", "code"),
    first_quick(
        2,
        [
            ({"input": "none.csv"}, "does not exist", 5),
            ({"params": "{first_name: Frist Name}"}, "requires `last_name`", 2),
            ({"waterfall": "moon_getter"}, "no waterfall `moon_getter`", 2),
            ({"output": "leads.csv"}, "the same file", 2),
            ({"limits": "{min_balance: 1000000000}"}, "limits.min_balance", 5),
            ({"limits": "{max_credits: 0.5}"}, "nothing would be asked", 12),
        ],
    ),
)
def test_what_would_end_the_run(ready: Office, api: Api, changed: dict[str, str], said: str, code: int) -> None:
    """With the exit code that the run would have."""
    ready.write_job(**changed)
    done = doctor(ready, api)
    assert done.code == code
    assert any(said in line for line in done.stdout.splitlines() if line.startswith("fail"))


def test_an_old_input_and_a_missing_cap(ready: Office, api: Api) -> None:
    """Warnings leave exit 0."""
    ready.write_job()
    three_days_ago = time.time() - 3 * 86_400
    os.utime(ready.folder / "leads.csv", (three_days_ago, three_days_ago))
    done = doctor(ready, api)
    assert done.code == 0
    assert "is the export still running?" in findings(done, "warn")["input"]
    assert "max_credits is not set" in findings(done, "warn")["cap"]


def test_a_run_that_is_at_work(ready: Office, api: Api) -> None:
    """It holds the lock; nobody is disturbed."""
    ready.command("run", "job.yaml", api=api)
    with hold(ready.ledger_path, 0):
        done = doctor(ready, api)
    assert done.code == 0
    assert "a run holds the ledger now" in findings(done, "warn")["lock"]


def test_doubts_and_results_that_expire(ready: Office, tmp_path: Path) -> None:
    """What waits for a person, and what waits at the API until it is gone."""
    with serving(tmp_path / "slow.db", latency="fixed(600)") as slow:
        (ready.folder / "key").write_text(slow.api_key, encoding="utf-8")
        ready.leave_at_the_api(slow)
        ledger = Ledger(ready.ledger_path)
        with ledger.transaction():
            ledger.doubt([(ledger.tasks()[0].attempts[0], "reset", 1, None)])
        ledger.close()
        done = doctor(ready, slow, "--at", "23:59")
        ready.write_job(limits="{max_credits: 50}", policy="{result_ttl: 1s}")
        late = doctor(ready, slow)
    assert "1 requests are in doubt" in findings(done, "warn")["doubts"]
    assert "2 paid requests wait at the API" in done.stdout
    assert "2 expire before the next run" in findings(late, "warn")["results"]


def test_a_cap_that_stopped_the_last_night(ready: Office, api: Api) -> None:
    """The rest was left pending."""
    ready.write_leads(people(20))
    ready.write_job(limits="{max_credits: 5}")
    assert ready.command("run", "job.yaml", api=api).code == 12
    done = doctor(ready, api)
    assert done.code == 0
    assert "1 of the last 1 runs stopped for credits" in findings(done, "warn")["cap"]


def test_a_ledger_on_a_network_file_system(ready: Office, api: Api) -> None:
    """Its locks cannot be trusted."""
    mounts = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {os.path.realpath(ready.folder)} rw - nfs4 nas:/x rw\n"
    with patch("enrich.nights.machine.mountinfo", lambda: mounts):
        done = doctor(ready, api)
    assert done.code == 0
    assert "network file system (nfs4)" in findings(done, "warn")["ledger"]


def test_a_clock_that_is_off(ready: Office, api: Api) -> None:
    """Against the API's."""
    an_hour_ago = time.time_ns() - 3_600 * 10**9
    with patch("enrich.setup.online.time.time_ns", lambda: an_hour_ago):
        done = doctor(ready, api)
    assert done.code == 0
    assert "behind the API's" in findings(done, "warn")["clock"]


@pytest.mark.long
def test_paths_that_crons_python_cannot_write(ready: Office, api: Api) -> None:
    """Only where the locale forbids UTF-8."""
    ready.write_job(output="Ausgänge.csv", limits="{max_credits: 50}")
    assert doctor(ready, api).code == 0
    old = ("--env", "PYTHONUTF8=0", "--env", "PYTHONCOERCECLOCALE=0", "--env", "LC_ALL=C")
    done = doctor(ready, api, *old)
    assert done.code == 5
    assert "in ascii" in findings(done, "fail")["names"]


def test_json_is_one_object(ready: Office, api: Api) -> None:
    """The findings with marks, messages and remedies."""
    told = doctor(ready, api, "--json").receipt
    assert told["exit_code"] == 0
    assert told["findings"][0] == {
        "mark": "ok",
        "subject": "key",
        "message": "cron will find it",
        "remedy": None,
    }


def test_the_sandbox_needs_no_key(ready: Office) -> None:
    """For a first look; nothing is left behind."""
    before = sorted(ready.folder.rglob("*"))
    done = ready.command("doctor", "job.yaml", "--sandbox")
    assert (done.code, sorted(ready.folder.rglob("*"))) == (0, before)


def test_the_environment_of_the_shell_comes_back(ready: Office, api: Api) -> None:
    """The doctor lives in cron's for a moment only."""
    with patch.dict(os.environ, {"MINE": "1"}):
        before = dict(os.environ)
        doctor(ready, api)
        assert dict(os.environ) == before


@pytest.mark.long
def test_as_a_program_under_an_empty_environment(ready: Office, api: Api) -> None:
    """What cron would say when it asked the doctor itself."""
    done = ready.enrich("doctor", "job.yaml", "--env", f"HOME={ready.folder}", "--offline", api=api)
    assert done.code == 3
    assert "cron will not have it" in done.stdout
