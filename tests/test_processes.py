"""`--processes`: several send and poll, and it is as if one did: one queue, one budget, one rate, one will."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from unittest.mock import patch

import pytest

from enrich.errors import LedgerLocked
from enrich.model import State
from enrich.pace import Pace
from enrich.receipt import Receipt
from enrich.sharedpace import SharedPace, Slate
from enrich.store.ledger import Ledger
from enrich.store.lock import hold, is_held
from tests.books import BOUND, Books
from tests.harness import Api, Office, kill, people, serving, until, usual_signals

RUN = ("run", "job.yaml", "--json")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Name the processes that a run has started."""
    told = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
    return [int(number) for number in told.split()]


def alive(number: int) -> bool:
    """Tell whether a process is there."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


def accepted(api: Api) -> int:
    """Count the runs that the API has taken."""
    return int(api.audit()["accepted"])


def answers(office: Office) -> list[dict[str, str]]:
    """Read the output, without what differs from night to night."""
    return [
        {name: cell for name, cell in row.items() if name not in ("enrich_task_id", "enrich_at")}
        for row in office.output()
    ]


def all_answered_once(office: Office, api: Api, receipt: Receipt, leads: int) -> None:
    """Hold the output against the API's books: nothing twice, nothing lost, nothing untold."""
    audit = api.audit()
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    rows = office.output()
    assert [row["First Name"] for row in rows] == [f"First{number}" for number in range(leads)]
    assert receipt.pending == 0
    untold = {row["First Name"] for row in rows if not row["enrich_task_id"]}
    doubtful = {row["First Name"] for row in rows if row["enrich_status"] == "in_doubt"}
    assert untold <= doubtful
    assert audit["accepted"] >= leads - len(doubtful)


@contextmanager
def at_work(office: Office, api: Api, processes: int = 2, *, group: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Start a run with several processes; whatever happens, none of them is left."""
    command = [sys.executable, "-m", "enrich", *RUN, "--processes", str(processes)]
    process = subprocess.Popen(
        command,
        cwd=office.folder,
        env={"PATH": os.defpath, "HOME": str(office.folder), **api.environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=usual_signals,
        process_group=0 if group else None,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill(process)
        process.stdout.close() if process.stdout else None
        process.stderr.close() if process.stderr else None


@pytest.mark.parametrize("dispatch", ["{bulk: null}", pytest.param("{bulk: 7}", marks=pytest.mark.long)])
def test_several_processes_answer_as_one_does(tmp_path: Path, office: Office, dispatch: str) -> None:
    """The same output, and each lead is bought once."""
    office.write_job(dispatch=dispatch)
    office.write_leads(people(90))
    told = []
    for number in (1, 2):
        with serving(tmp_path / f"{number}.db", failure_rate=0.1) as api:
            more = ("--processes", str(number), "--ledger", f"{number}.ledger", "--new-ledger")
            done = office.command(*RUN, *more, api=api)
            audit = api.audit()
        assert (done.stderr if done.code == 0 else "") == ""
        assert audit["paid_twice"] == 0
        told.append((done.code, answers(office), done.receipt["credits_spent"], done.receipt["submitted"]))

    assert told[0] == told[1]


def test_one_process_is_the_default_and_starts_none(api: Api, office: Office) -> None:
    """Neither by itself, nor when there is work for one only."""
    office.write_leads(people(6))
    with patch("enrich.hands.subprocess.Popen", side_effect=AssertionError):
        assert office.command(*RUN, "--limit", "5", api=api).receipt["submitted"] == 5
        assert office.command(*RUN, "--processes", "8", api=api).receipt["submitted"] == 1
        assert office.command(*RUN, "--processes", "8", api=api).receipt["submitted"] == 0


@pytest.mark.long
def test_all_keep_to_one_cap(tmp_path: Path, office: Office) -> None:
    """Never above it; and none stops while what another waits for may free some."""
    office.write_job(limits="{requests_per_second: 1000, max_credits: 12}")
    office.write_leads(people(90))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
        done = office.command(*RUN, "--processes", "3", api=api)
        audit = api.audit()
    with closing(office.ledger()) as ledger:
        (worst,) = ledger._db.execute("SELECT max(reserved) FROM attempts").fetchone()

    assert done.code == 12
    assert audit["credits_charged"] == pytest.approx(done.receipt["credits_spent"])
    assert 12 - worst / 1e6 < audit["credits_charged"] <= 12


@pytest.mark.long
def test_a_limit_and_a_canary_count_for_all(api: Api, office: Office) -> None:
    """The canary is one process' work, the limit is kept by the queue."""
    office.write_job(canary="{rows: 5, min_hit_rate: 0.01}")
    office.write_leads(people(40))

    done = office.command(*RUN, "--processes", "2", "--limit", "30", api=api)

    assert (done.code, done.receipt.get("submitted"), done.receipt.get("pending")) == (0, 30, 10), done.stderr
    assert accepted(api) == 30


@pytest.mark.long
def test_all_keep_to_one_rate(tmp_path: Path, office: Office) -> None:
    """Each at the ceiling alone would be answered 429; together they are not."""
    office.write_job(limits="{requests_per_second: 50}")
    office.write_leads(people(60))
    with serving(tmp_path / "api.db", rate=55.0, burst=15) as api:
        done = office.command(*RUN, "--processes", "2", api=api)

    assert (done.code, done.receipt["rate_limited"]) == (0, 0)


@contextmanager
def shared(pace: Pace, count: int) -> Iterator[list[SharedPace]]:
    """Share a pace, as so many processes would."""
    with TemporaryFile() as file:
        file.truncate(Slate.SIZE)
        slates = [Slate(file.fileno()) for _ in range(count)]
        slates[0].write(vars(pace))
        yield [SharedPace(slate) for slate in slates]
        for slate in slates:
            slate.close()


def test_a_shared_pace_is_one_pace() -> None:
    """Whoever calls it: after each call all know what one pace alone would."""
    alone = Pace(None)
    with shared(Pace(None), 3) as many:
        now = 100.0
        for step in range(300):
            mine = many[step % 3]
            now += alone.delay(now)
            assert mine.delay(now) == alone.delay(now)
            for pace in (alone, mine):
                pace.take(now)
                if step % 40 == 39:
                    pace.throttled(now, 0.5)
                else:
                    pace.answered(now)
            many[(step + 1) % 3].delay(now)
            alone.delay(now)
            assert vars(many[(step + 1) % 3]) == vars(alone)


def test_who_dies_holding_the_rate_leaves_it_whole(office: Office) -> None:
    """The system frees the lock, and the state is the one before."""
    hang = "import sys\nfrom enrich.sharedpace import Slate\nslate = Slate(int(sys.argv[1]))\nwith slate.held():\n"
    hang += "    other = slate.begin({'rate': 5.0})\n    print('held', flush=True)\n    sys.stdin.read()\n"
    with shared(Pace(7.0), 1) as [mine]:
        process = subprocess.Popen(
            [sys.executable, "-c", hang, str(mine.slate.file)],
            pass_fds=[mine.slate.file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=office.folder,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        kill(process)

        assert mine.delay(0.0) == 0.0
        assert mine.rate == 7.0


@pytest.mark.long
def test_a_killed_process_is_replaced(tmp_path: Path, office: Office) -> None:
    """What it had on the wire is in doubt and told so; all else is answered, and nothing is bought twice."""
    office.write_job(limits="{requests_per_second: 120}")
    office.write_leads(people(120))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api, at_work(office, api) as process:
        until(lambda: accepted(api) >= 30 and len(workers(process)) == 2)
        os.kill(workers(process)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=40)
        receipt = Receipt(**json.loads(out))
        all_answered_once(office, api, receipt, 120)

    assert process.returncode in (0, 14), err
    assert process.returncode == (14 if receipt.in_doubt else 0)
    assert any("was killed" in note for note in receipt.notes)


def test_no_room_for_what_the_processes_share(api: Api, office: Office) -> None:
    """A full disk where temporary files lie is told; one process does it all."""
    office.write_leads(people(10))

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("enrich.hands.tempfile.TemporaryFile", side_effect=full):
        done = office.command(*RUN, "--processes", "2", api=api)

    assert done.code == 0, done.stderr
    assert any("one process goes on alone" in note for note in done.receipt["notes"])
    assert len(office.output()) == accepted(api) == 10


@pytest.mark.long
def test_killed_as_a_whole(tmp_path: Path, office: Office) -> None:
    """Left alone, the processes write down what is on the wire and go; until then nobody gets the ledger."""
    office.write_job(limits="{requests_per_second: 200}")
    office.write_leads(people(120))
    with serving(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
        with at_work(office, api) as process:
            until(lambda: accepted(api) >= 20)
            api.fault("slow", 500, "post", seconds=1)
            bought = accepted(api)
            until(lambda: accepted(api) > bought)
            left = workers(process)
            process.kill()
            process.wait()
            assert all(map(alive, left))
            assert is_held(office.ledger_path)
            with pytest.raises(LedgerLocked), hold(office.ledger_path, 0):
                pass
            until(lambda: not any(map(alive, left)))
            assert len(left) == 2
        until(lambda: is_held(office.ledger_path) is False, 2)  # the threads of a process end one by one
        api.heal()
        receipt = office.run(api)
        all_answered_once(office, api, receipt, 120)

    assert (receipt.exit_code, receipt.in_doubt) == (0, 0)


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_signal_to_all_is_the_first_ones_to_obey(
    tmp_path: Path, office: Office, number: signal.Signals, code: int
) -> None:
    """Ctrl-C reaches every process of the terminal: one winds down, the others write down and go with it."""
    office.write_leads(people(150))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api, at_work(office, api, group=True) as process:
        until(lambda: accepted(api) >= 20)
        api.fault("slow", 500, "post", seconds=1)
        bought = accepted(api)
        until(lambda: accepted(api) > bought)
        left = workers(process)

        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=20)

        assert process.returncode == code, err
        assert not any(map(alive, left))
        with closing(office.ledger()) as ledger:
            counts = ledger.counts()
        assert State.SUBMITTING not in counts
        assert State.IN_DOUBT not in counts
        assert counts.get(State.SUBMITTED, 0) == accepted(api)
    assert json.loads(out)["exit_code"] == code
    assert "Traceback" not in err


@pytest.mark.long
def test_a_signal_finds_posts_that_nobody_has_told_of(tmp_path: Path, office: Office) -> None:
    """The first POSTs left just now: their answers are waited for, though the first process has not heard of them."""
    office.write_leads(people(60))
    with serving(tmp_path / "api.db") as api, at_work(office, api) as process:
        api.fault("slow", 500, "post", seconds=3)
        until(lambda: len(workers(process)) == 2)
        with closing(office.ledger()) as ledger:
            until(lambda: State.SUBMITTING in ledger.counts())
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
            counts = ledger.counts()

        assert process.returncode == 130, err
        assert State.IN_DOUBT not in counts
        assert counts.get(State.SUBMITTED, 0) == accepted(api)


@pytest.mark.long
def test_a_refused_key_stops_all(api: Api, office: Office) -> None:
    """One hears 401, none sends any more."""
    office.write_job(limits="{requests_per_second: 60}")
    office.write_leads(people(150))
    with at_work(office, api) as process:
        until(lambda: accepted(api) >= 20)
        api.fault("unauthorized", 1, "post")
        out, err = process.communicate(timeout=20)

    receipt = json.loads(out)
    assert process.returncode == 3, err
    assert receipt["submitted"] == accepted(api) < 150
    assert "refuses the key" in err


@pytest.mark.long
def test_the_time_is_over_for_all(tmp_path: Path, office: Office) -> None:
    """At --max-time the processes go; the next run collects what they left, with several again."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        first = office.command(*RUN, "--processes", "2", "--max-time", "5s", api=api)
    with serving(tmp_path / "api.db") as api:
        api.advance(90)
        second = office.command(*RUN, "--processes", "2", api=api)

        assert (first.code, first.receipt["pending"]) == (13, 30)
        assert (second.code, second.receipt["pending"]) == (0, 0)
        assert first.receipt["submitted"] + second.receipt["submitted"] == accepted(api) == 30


@pytest.mark.long
def test_no_key_is_to_be_seen(tmp_path: Path, office: Office) -> None:
    """Neither the arguments of the processes nor anything that they write have it."""
    office.write_leads(people(40))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api, at_work(office, api) as process:
        until(lambda: accepted(api) >= 10 and len(workers(process)) == 2)
        seen = [Path(f"/proc/{number}/cmdline").read_text(encoding="utf-8") for number in workers(process)]

    assert len(seen) == 2
    assert not any(api.api_key in arguments for arguments in seen)


def test_what_is_in_flight_is_known_by_its_age(tmp_path: Path) -> None:
    """A process that met the cap waits for what others may free, but not for what nobody waits for any more."""
    books = Books.open(tmp_path / "leads.db")
    books.start(None)
    books.enroll([1])
    told: list[Any] = [books.do(Ledger.awaits, 0)]
    claim = books.claim()
    told.append(books.do(Ledger.awaits, 0))
    books.do(Ledger.accepted, [(claim.attempt_id, "task", 5_000)], BOUND)
    told += [books.do(Ledger.awaits, since) for since in (4_000, 6_000)]
    books.ledger.close()

    assert told == [False, True, True, False]
