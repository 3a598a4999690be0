"""Real runs that are watched from another process, killed, stopped, and logged: the run does not notice."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest

from enrich.job import load_job
from enrich.look.lookout import Lookout
from enrich.look.picture import Sign, headline
from enrich.look.status import read_status
from enrich.look.watch import ENTER, LEAVE, WAITING, watch_job
from enrich.watch import runlog
from tests.harness import Office, kill, people, serving, shown_on, until, usual_signals
from tests.watch import log_lines

pytestmark = pytest.mark.long


def objects(text: str) -> list[dict[str, Any]]:
    """Read one object a line."""
    return [json.loads(row) for row in text.splitlines()]


def test_a_watched_run_is_as_any_other(tmp_path: Path, office: Office) -> None:
    """Watched from before its start to its end by two at once: same receipt, clean audit, and the same numbers."""
    office.write_leads(people(8))
    other = Office(tmp_path / "other")
    other.folder.mkdir()
    other.write_job()
    other.write_leads(people(8))
    with serving(tmp_path / "other.db") as api:
        unwatched = other.command("run", "job.yaml", "--json", api=api).receipt
    watchers = [office.start("status", "job.yaml", "--watch", "--every", "1s", *more) for more in ((), ("--json",))]
    first = [watcher.stdout.readline() for watcher in watchers if watcher.stdout is not None]
    with serving(tmp_path / "api.db", latency="fixed(1)") as api:
        receipt = office.enrich("run", "job.yaml", "--json", api=api).receipt
        audit = api.audit()
    told = [watcher.communicate(timeout=20) for watcher in watchers]

    assert ("there is no ledger yet" in first[0], json.loads(first[1])["sign"]) == (True, "no ledger")
    assert [watcher.returncode for watcher in watchers] == [0, 0]
    assert [err for _, err in told] == ["", ""]
    told_apart = {"polls", "elapsed_s", "output", "rate_limited"}
    assert {k: v for k, v in receipt.items() if k not in told_apart} == {
        k: v for k, v in unwatched.items() if k not in told_apart
    }
    assert (audit["accepted"], audit["paid_twice"]) == (8, 0)
    last = objects(told[1][0])[-1]
    assert (last["sign"], last["exit_code"], last["outcome"]) == ("ended", 0, "ok")
    assert (last["done"], last["total"], last["submitted"]) == (8, 8, 8)
    assert last["credits_spent"] == receipt["credits_spent"] == pytest.approx(audit["credits_charged"])
    assert (last["polls"], last["states"].get("found")) == (receipt["polls"], receipt["found"])
    assert "exit 0 (ok)" in told[0][0].splitlines()[-1]
    assert read_status(load_job(office.job_file))["at_work"] is None


def test_a_run_that_is_stopped_or_killed_gives_no_sign_of_life(tmp_path: Path, office: Office) -> None:
    """Stopped it may come back, and is at work again; killed it does not, and the next run is watched to its end."""
    office.write_leads(people(3))
    lookout = Lookout(load_job(office.job_file), patience_s=3.0)
    with serving(tmp_path / "api.db", latency="fixed(600)") as api:
        run = office.start("run", "job.yaml", api=api)
        until(lambda: (lookout.look().as_json().get("in_flight") or 0) == 3)
        status = office.command("status", "job.yaml", "--json").receipt
        assert (status["at_work"]["execution"], status["at_work"]["total"], status["at_work"]["done"]) == (1, 3, 0)
        assert "at work since" in office.command("status", "job.yaml").stdout
        run.send_signal(signal.SIGSTOP)
        until(lambda: lookout.look().sign is Sign.SILENT)
        run.send_signal(signal.SIGCONT)
        until(lambda: lookout.look().sign is Sign.AT_WORK)
        kill(run)
        until(lambda: lookout.look().sign is Sign.SILENT)
        assert "killed, asleep or stopped while asking" in headline(lookout.look())

        told = io.StringIO()
        watching = threading.Thread(target=watch_job, args=(lookout, told, {}, 0.05), kwargs={"as_json": True})
        watching.start()
        until(lambda: "no sign of life" in told.getvalue())
        api.advance(601)
        assert office.command("run", "job.yaml", api=api).code == 0
        watching.join(timeout=20)

    assert objects(told.getvalue())[0]["sign"] == "no sign of life"
    assert (objects(told.getvalue())[-1]["execution"], objects(told.getvalue())[-1]["exit_code"]) == (2, 0)


def test_ctrl_c_leaves_the_watch_quietly(office: Office) -> None:
    """On a real terminal of 40 columns: exit 130, no word, the screen and the cursor given back."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 40, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "enrich", "status", "job.yaml", "--watch"],
        cwd=office.folder,
        env={"PATH": os.defpath, "HOME": str(office.folder), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=usual_signals,
    )
    os.close(theirs)
    shown = shown_on(ours, up_to=WAITING.encode()[:30])
    process.send_signal(signal.SIGINT)
    shown += shown_on(ours)
    assert process.wait(timeout=20) == 130
    os.close(ours)

    text = shown.decode()
    assert text.startswith(ENTER)
    assert text.endswith(LEAVE)
    assert "error" not in text
    drawn = text.removeprefix(ENTER).removesuffix(LEAVE).split("\x1b[H")[1]
    # The terminal makes a carriage return of its own.
    assert max(len(re.sub(r"\x1b\[[\d;]*\w|\r", "", row)) for row in drawn.split("\n")) < 40


@pytest.mark.parametrize(
    ("options", "said"), [(("--every", "2s"), "--watch"), (("--watch", "--every", "0s"), "too often")]
)
def test_a_wish_that_makes_no_sense_is_told(office: Office, options: tuple[str, ...], said: str) -> None:
    """Exit 2."""
    done = office.command("status", "job.yaml", *options)

    assert (done.code, said in done.stderr) == (2, True)


# The line a minute


@pytest.mark.parametrize("way", ["canary", "outage", "left"])
def test_the_log_has_its_line_in_every_step(
    tmp_path: Path, office: Office, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Also under --quiet: in the canary, in an outage, while it collects what was left."""
    monkeypatch.setattr(runlog, "EVERY_S", 0.4)
    office.write_leads(people(6))
    options = ["run", "job.yaml", "--quiet", "--log-file", "run.log"]
    if way == "canary":
        office.write_job(canary="{rows: 5, min_hit_rate: 0.01}")
    with serving(tmp_path / "api.db", latency="fixed(600)" if way == "left" else "fixed(1)") as api:
        if way == "left":
            office.leave_at_the_api(api)
            api.advance(601)
            api.fault("slow", 6, "get", seconds=1)
        if way == "outage":
            api.fault("error-before", 6, "get")
        done = office.command(*options, api=api)

    told = [row for row in log_lines(office) if row["event"] == "progress"]
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    assert told
    assert {"done", "found", "in_flight", "credits", "polls", "rate_limited"} < told[-1].keys()
    assert told[0]["execution"] == (2 if way == "left" else 1)
    assert sum(row["submitted_per_minute"] for row in told) > 0 or way == "left"
