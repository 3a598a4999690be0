"""The healthcheck and the notifications: who is told what, and that none of them can break or expose anything."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from enrich.errors import Exit
from enrich.store.lock import hold
from enrich.watch import healthcheck, notify, outcome
from tests.cases import first_quick
from tests.harness import Api, Office, serving, until
from tests.watch import Ear, assert_nobody_in, events, listening, log_lines, somebody
from tests.wire import answering, http

LOG = ("--log-file", "run.log")
# Apprise imports it where it is there.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


@pytest.fixture
def ear() -> Iterator[Ear]:
    """A server that hears pings and notifications."""
    with listening() as heard:
        yield heard


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(healthcheck, "PAUSE_S", 0.0)


@pytest.fixture
def pinged(office: Office, ear: Ear) -> Office:
    """An office whose job has a healthcheck."""
    office.write_job(healthcheck=ear.url)
    office.write_leads(somebody(3))
    return office


# The healthcheck


def test_a_run_pings_its_start_and_its_success(api: Api, pinged: Office, ear: Ear) -> None:
    """Both carry the same run id; the second says in one line what came of it, and nobody's name."""
    done = pinged.command("run", "job.yaml", *LOG, api=api)

    assert (done.code, done.stderr) == (0, "")
    assert ear.paths == ["/secret-path/start", "/secret-path"]
    assert ear.heard[0].query == ear.heard[1].query
    assert len(ear.heard[0].query["rid"][0]) == 36
    body = ear.heard[1].body
    assert body.startswith("job: exit 0 (ok); job: 3 rows")
    assert "\n" not in body
    assert_nobody_in(body, pinged)
    assert "secret-path" not in (pinged.folder / "run.log").read_text()


def test_what_needs_a_person_is_a_failure(api: Api, pinged: Office, ear: Ear) -> None:
    """Doubts, and a key that is missing: the latter never began."""
    api.fault("no-task-id")
    assert pinged.command("run", "job.yaml", api=api).code == 14
    assert ear.paths == ["/secret-path/start", "/secret-path/fail"]

    assert pinged.command("run", "job.yaml").code == 3
    assert ear.paths[2:] == ["/secret-path/fail"]
    assert ear.heard[2].body == "job: exit 3 (key refused)"


def test_failed_rows_and_a_long_night_are_a_success(tmp_path: Path, pinged: Office, ear: Ear) -> None:
    """Exit 10 is told by its counts, exit 13 goes on by itself."""
    pinged.write_leads(somebody(12))
    with serving(tmp_path / "f.db", failure_rate=0.5, free_failures=0.0) as api:
        assert pinged.command("run", "job.yaml", api=api).code == 10
    with serving(tmp_path / "s.db", latency="fixed(3600)") as api:
        code = pinged.command("run", "job.yaml", "--retry", "failed", "--max-time", "1s", api=api).code

    assert code == 13
    assert ear.paths == ["/secret-path/start", "/secret-path"] * 2


def test_who_is_locked_out_pings_nothing(api: Api, pinged: Office, ear: Ear) -> None:
    """The run that is at work will tell; a turn that was skipped is no failure."""
    with hold(pinged.ledger_path, 0):
        assert pinged.command("run", "job.yaml", api=api).code == 11
        assert pinged.command("run", "job.yaml", "--if-locked", "skip", api=api).code == 0

    assert ear.heard == []


def test_the_sandbox_pings_nothing(pinged: Office, ear: Ear) -> None:
    """Who tries something turns no dashboard green or red."""
    assert pinged.command("run", "job.yaml", "--sandbox", "--limit", "0").code == 0

    assert ear.heard == []


@pytest.mark.long
def test_an_interrupted_run_leaves_its_start_alone(tmp_path: Path, pinged: Office, ear: Ear) -> None:
    """It must leave quickly; the check itself notices that nothing more comes."""
    with serving(tmp_path / "slow.db", latency="fixed(3600)") as api:
        process = pinged.start("run", "job.yaml", api=api)
        until(lambda: api.audit()["accepted"] == 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)

    assert process.returncode == 143
    assert ear.paths == ["/secret-path/start"]


def test_a_hiccup_of_the_server_is_tried_again(api: Api, pinged: Office, ear: Ear) -> None:
    """A 5xx twice is no news."""
    ear.answers += [500, 503]

    done = pinged.command("run", "job.yaml", api=api)

    assert (done.code, done.stderr) == (0, "")
    assert ear.paths == ["/secret-path/start"] * 3 + ["/secret-path"]


def test_a_wrong_address_is_told_and_not_tried_again(api: Api, pinged: Office, ear: Ear) -> None:
    """One note for the run, with the host alone."""
    ear.answers += [404, 404]

    done = pinged.command("run", "job.yaml", *LOG, api=api)

    assert done.code == 0
    assert done.stderr == "note: the healthcheck at 127.0.0.1 was not told: HTTP 404\n"
    assert len(ear.heard) == 2
    assert events(pinged) == ["start", "end", "note"]
    assert "secret" not in (pinged.folder / "run.log").read_text()


@pytest.mark.parametrize("way", first_quick(1, ["down", "hanging", "nowhere"]))
def test_a_server_that_does_not_answer_breaks_nothing(
    api: Api, pinged: Office, ear: Ear, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The run does its work, says once that the ping was lost, and shows no secret."""
    monkeypatch.setattr(healthcheck, "TRY_S", 0.1)
    monkeypatch.setattr(healthcheck, "PATIENCE_S", 1.0)
    if way == "hanging":
        ear.may_answer.clear()
    else:
        there = {"down": "127.0.0.1:9", "nowhere": "no-such-host.invalid"}[way]
        pinged.write_job(healthcheck=f"http://{there}/secret-path")

    done = pinged.command("run", "job.yaml", *LOG, api=api)

    assert done.code == 0
    assert len(pinged.output()) == 3
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("note: the healthcheck at ")
    assert "secret" not in done.stderr + (pinged.folder / "run.log").read_text()


@pytest.mark.parametrize("value", first_quick(1, ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "http://["]))
def test_a_healthcheck_on_loopback_is_pinged_directly(api: Api, pinged: Office, ear: Ear, value: str) -> None:
    """Whatever the proxy variables say."""
    done = pinged.command("run", "job.yaml", api=api, http_proxy=value, HTTP_PROXY=value, ALL_PROXY=value)
    assert (done.code, done.stderr) == (0, "")
    assert len(ear.heard) == 2


@pytest.mark.parametrize("scheme", first_quick(1, ["http", "https"]))
def test_a_ping_takes_the_proxy_of_the_environment(api: Api, pinged: Office, scheme: str) -> None:
    """One that cannot be used is a note by name, without its password."""
    pinged.write_job(healthcheck=f"{scheme}://hc.example/secret-path")
    with answering(http(502)) as proxy:
        done = pinged.command("run", "job.yaml", api=api, all_proxy=f"ada:secret@127.0.0.1:{proxy.port}")
        line = "POST http://hc.example/secret-path" if scheme == "http" else "CONNECT hc.example:443"
        assert proxy.requests
        assert all(seen.line.startswith(line) for seen in proxy.requests)
    assert done.code == 0
    assert "note: the healthcheck at hc.example" in done.stderr
    done = pinged.command("run", "job.yaml", api=api, ALL_PROXY="socks5://ada:secret@127.0.0.1:9")
    assert done.code == 0
    assert "was not told: ALL_PROXY: " in done.stderr
    assert "secret" not in done.stderr


def test_an_address_that_is_none_is_exit_2_and_is_not_shown(api: Api, pinged: Office) -> None:
    """The line of the job file is named."""
    pinged.write_job(healthcheck="https://1.2.3.999/secret-path")

    done = pinged.command("run", "job.yaml", api=api)

    assert done.code == 2
    assert "job.yaml:12: healthcheck: must be an address" in done.stderr
    assert "secret" not in done.stderr


# Notifications


@pytest.fixture
def noticed(office: Office, ear: Ear) -> Office:
    """An office whose job notifies somebody."""
    office.write_job(notify="people.txt")
    office.write_leads(somebody(3))
    addresses = office.folder / "people.txt"
    addresses.write_text(f"# on call\n\njson://127.0.0.1:{ear.port}/secret-path\n")
    addresses.chmod(0o600)
    return office


def test_doubts_are_told_with_the_way_out(api: Api, noticed: Office, ear: Ear) -> None:
    """The title says what, the text has the receipt and the exact commands, and nobody's name."""
    api.fault("no-task-id")

    where = ("--ledger", "my ledger.db", "--output", "out.csv")
    done = noticed.command("run", "job.yaml", *where, *LOG, api=api)

    assert done.code == 14
    (heard,) = ear.heard
    told = json.loads(heard.body)
    assert told["title"] == "enrich job: in doubt (exit 14)"
    assert "in_doubt              1  33.3%" in told["message"]
    commands = [shlex.split(line) for line in told["message"].splitlines() if line.startswith("  enrich ")]
    job = [str(noticed.job_file), "--ledger", str(noticed.folder / "my ledger.db")]
    output = ["--output", str(noticed.folder / "out.csv")]
    assert commands == [
        ["enrich", "reconcile", *job],
        ["enrich", "run", *job, *output, "--retry", "in_doubt"],
        ["enrich", "run", *job, *output, "--accept", "in_doubt"],
    ]
    assert [noticed.command(*command[1:], api=api).code for command in commands] == [0, 0, 0]
    assert_nobody_in(told["message"], noticed)
    assert "secret" not in done.stderr + (noticed.folder / "run.log").read_text()


def test_a_missing_key_is_told(noticed: Office, ear: Ear) -> None:
    """What went wrong before an execution existed is told, too."""
    assert noticed.command("run", "job.yaml").code == 3

    told = json.loads(ear.heard[0].body)
    assert told["title"] == "enrich job: key refused (exit 3)"
    assert "DATABAR_API_KEY" in told["message"]
    assert f"enrich run {noticed.job_file}" in told["message"]


def test_a_good_night_and_a_locked_one_tell_nobody(api: Api, noticed: Office, ear: Ear) -> None:
    """Nor does the sandbox."""
    assert noticed.command("run", "job.yaml", api=api).code == 0
    with hold(noticed.ledger_path, 0):
        assert noticed.command("run", "job.yaml", api=api).code == 11
    assert noticed.command("run", "job.yaml", "--sandbox", "--max-credits", "0").code == 12

    assert ear.heard == []


def test_without_its_extra_nobody_is_told_and_that_is_said(
    api: Api, noticed: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear note at the start; the run is unaffected."""
    monkeypatch.setattr(notify, "find_spec", lambda _: None)
    api.fault("no-task-id")

    done = noticed.command("run", "job.yaml", "--quiet", api=api)

    assert done.code == 14
    assert [line for line in done.stderr.splitlines() if line.startswith("note:")] == [
        "note: nobody can be notified without the extra: pip install 'databar-enrich[notify]'"
    ]


def test_addresses_that_others_may_read_are_warned_of(api: Api, noticed: Office) -> None:
    """They are secrets."""
    (noticed.folder / "people.txt").chmod(0o644)

    done = noticed.command("run", "job.yaml", *LOG, api=api)

    assert done.code == 0
    assert "people.txt: others may read the addresses in it: chmod 600" in done.stderr
    assert log_lines(noticed)[1]["event"] == "note"


@pytest.mark.parametrize(
    ("content", "words"), first_quick(1, [(None, "No such file"), ("# nobody\n", "no address"), (b"\xff", "UTF-8")])
)
def test_a_file_without_addresses_is_told_at_the_start(
    api: Api, noticed: Office, content: str | bytes | None, words: str
) -> None:
    """Not only on the night when somebody is needed."""
    path = noticed.folder / "people.txt"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    done = noticed.command("run", "job.yaml", api=api)

    assert done.code == 0
    assert "people.txt: nobody can be notified" in done.stderr
    assert words in done.stderr


def test_lines_that_do_not_work_are_named_by_their_number(noticed: Office, ear: Ear) -> None:
    """The address is in no message; the others are told all the same."""
    path = noticed.folder / "people.txt"
    path.write_text(f"secret-nonsense\n{path.read_text()}json://127.0.0.1:9/secret\n")

    done = noticed.command("run", "job.yaml", *LOG)

    assert done.code == 3
    assert len(ear.heard) == 1
    assert "line 1 is no Apprise URL; line 5 did not take it" in done.stderr
    assert "secret" not in done.stderr + (noticed.folder / "run.log").read_text()


def test_a_service_that_hangs_is_not_waited_for(noticed: Office, ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends, and says so."""
    monkeypatch.setattr(notify, "PATIENCE_S", 0.2)
    ear.may_answer.clear()

    done = noticed.command("run", "job.yaml")

    assert done.code == 3
    assert "people.txt: not everybody was notified: it took too long" in done.stderr


# The table


def test_every_exit_code_has_its_word_and_its_advice() -> None:
    """Nobody is woken without a command that helps, and no code is both fine and not."""
    assert {int(code) for code in Exit} <= set(outcome.WORDS)
    for code in outcome.WORDS:
        assert bool(outcome.needs(code, {}, outcome.Target("job.yaml", "job.yaml"))) is outcome.needs_a_person(code)
    assert [code for code in outcome.WORDS if outcome.needs_a_person(code)] == [1, 2, 3, 4, 5, 12, 14, 15]
