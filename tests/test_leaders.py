"""Who works for a run works no longer than it does, and what is done to a ledger waits for all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from enrich.errors import Exit, LeaderGone, LedgerLocked
from enrich.place import LedgerPlace, locate_ledger
from enrich.place import Postgres as Place
from enrich.store.copying import copy
from enrich.store.database import exists
from enrich.store.dialect import DatabaseFailed
from enrich.store.lease import Lease
from enrich.store.ledger import Ledger
from enrich.store.opening import alone, leased, opened
from enrich.store.records import check
from tests.books import PRICE, Books, ask
from tests.cases import first_quick, in_turn
from tests.harness import Api, Office, people
from tests.postgres import Postgres


@pytest.fixture
def where() -> str:
    """Only at a server are there leases."""
    return "server"


@pytest.fixture
def ledger(place: LedgerPlace) -> Place:
    """Make a ledger on a server."""
    assert isinstance(place, Place)
    Ledger(place).close()
    return place


@pytest.fixture
def worker(ledger: Place) -> Iterator[tuple[Ledger, Lease]]:
    """Be a worker whose run was killed: nobody holds the lock, and the lease of who led has ended."""
    with ExitStack() as run, ExitStack() as stack:
        _, leader = run.enter_context(opened(ledger))
        assert leader is not None
        worker = stack.enter_context(leased(ledger, follows=leader.fence.owner))
        run.close()
        yield worker


# A worker and who leads it


def test_a_worker_begins_no_lease_for_a_run_that_is_over(ledger: Place) -> None:
    """It was asleep, and wakes up when the next run may be at work already."""
    with opened(ledger) as (_, leader):
        assert leader is not None
        with leased(ledger, follows=leader.fence.owner) as (mine, lease):
            assert lease.holds()
            assert [other.leads for other in mine.others()] == [True]
    with pytest.raises(LeaderGone), leased(ledger, follows=leader.fence.owner):
        pass
    assert ask(ledger, "SELECT count(*) FROM owners") == [(0,)]


def test_who_is_dismissed_begins_no_lease(ledger: Place) -> None:
    """Another has ended the lease of who led, and waits for those who are left."""
    with opened(ledger) as (mine, leader):
        assert leader is not None
        other = Ledger(ledger)
        other.end_lease_of(other.others())
        other.close()
        with pytest.raises(LeaderGone), leased(ledger, follows=leader.fence.owner):
            pass
        assert mine.owner == leader.fence.owner


def test_who_looks_for_those_left_sees_the_worker_or_its_leader(ledger: Place) -> None:
    """Also while a worker is about to begin, whose leader's lease has run out: nobody goes on as if alone."""
    leader, beginner, looker = (Ledger(ledger) for _ in range(3))
    with leader.transaction():
        number = leader.begin_lease("leader", 30)
    ask(ledger, "UPDATE owners SET lease_until = now() - interval '1 s', seconds = 1e-9")
    beginner._db.begin()
    beginner.begin_lease("worker", 30, follows=number)
    assert [owner.name for owner in looker.others()] == ["leader"]
    beginner._db.commit()
    assert [owner.name for owner in looker.others()] == ["worker"]
    for each in (leader, beginner, looker):
        each.close()


# What a crash leaves


def test_a_lease_may_end_at_any_moment_of_a_recovery(books: Books, place: LedgerPlace) -> None:
    """What its holder was at is in doubt with its request, or neither yet: nothing is torn."""
    assert isinstance(place, Place)
    books.begin(1, 2, 3, 4, 5, 6, 7, 8)
    done = 0
    for moment in range(1, 5):
        with opened(place) as (_, leader):
            assert leader is not None
            holder = Ledger(place, fence=leader.fence)
            with holder.transaction():
                holder.claim(books.execution, PRICE, books.now)
            _at(books.ledger, moment, lambda: ask(place, "DELETE FROM owners"))
            books.do(Ledger.recover, books.now)
            assert check(place).problems == []
            holder.close()
        done += books.do(Ledger.recover, books.now)
        assert check(place).problems == []
    assert books.all("SELECT attempts FROM requests WHERE state = 'in_doubt'") == [(1,)] * 4
    assert done < 4  # some were found by the first look


def _at(ledger: Ledger, moment: int, strike: Callable[[], object]) -> None:
    """Let something happen before one of the next statements of a ledger."""
    execute, left = ledger._db.execute, [moment]

    def told(sql: str, values: Sequence[Any] = (), /) -> Any:
        left[0] -= 1
        if left[0] == 0:
            strike()
        return execute(sql, values)

    ledger._db.execute = told  # type: ignore[method-assign]


# Several at once


def test_nobody_waits_for_who_only_names_the_execution(books: Books, place: LedgerPlace) -> None:
    """An answer that is written down refers to it; a claim that waited for that could be waited for in turn."""
    books.begin(1, 2)
    attempt = books.submit()
    with closing(Ledger(place)) as other, other.transaction():
        other._db.execute("UPDATE attempts SET settled_in = ? WHERE id = ?", (books.execution, attempt))
        books.ledger._db.execute("SET lock_timeout = '5s'")
        assert books.claim()


# What is done to a ledger that no run is at work with


def test_nobody_is_alone_with_a_ledger_while_a_worker_lives(ledger: Place, worker: tuple[Ledger, Lease]) -> None:
    """Though nobody holds its lock: it may send yet what it has claimed."""
    assert worker[1].holds()
    with pytest.raises(LedgerLocked, match="left processes behind"), alone(ledger):
        pass


def test_a_run_sees_who_is_alone_with_a_ledger(ledger: Place) -> None:
    """Also when the server has lost its lock: who is alone has a lease, as one who leads."""
    with alone(ledger), closing(Ledger(ledger)) as other:
        assert [owner.leads for owner in other.others()] == [True]


def test_nothing_is_copied_while_a_worker_lives(ledger: Place, worker: tuple[Ledger, Lease], tmp_path: Path) -> None:
    """What it buys in the old ledger the new one would buy again."""
    assert worker[1].holds()
    with pytest.raises(LedgerLocked):
        copy(ledger, tmp_path / "copy.db")
    assert not exists(tmp_path / "copy.db")


@pytest.mark.parametrize("command", [("forget", "--match", "First Name=First1"), ("purge", "--older-than", "0s")])
def test_nothing_is_erased_while_a_worker_lives(api: Api, office: Office, command: tuple[str, ...]) -> None:
    """It would be told of again by what comes yet."""
    office.write_leads(people(2))
    assert office.command("run", "job.yaml", api=api).code == 0
    assert isinstance(office.place, Place)
    with opened(office.place) as (_, leader):
        assert leader is not None
        done = office.command(command[0], "job.yaml", *command[1:], "--yes")
    again = office.command(command[0], "job.yaml", *command[1:], "--yes")

    assert (done.code, again.code) == (Exit.LOCKED, 0), (done.stderr, again.stderr)


# A clock that nobody sets


def test_a_lease_tells_the_servers_time_though_somebody_sets_this_machines_clock(
    ledger: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What processes write down for each other has one time."""
    with opened(ledger) as (mine, lease):
        assert lease is not None
        hours_ago = time.time_ns() - 10**9 * 7200
        monkeypatch.setattr(time, "time_ns", lambda: hours_ago)
        assert abs(lease.now_ms() - mine.now_ms()) < 60_000


def test_a_transaction_that_could_not_begin_is_no_obstacle(books: Books) -> None:
    """The connection serves the next one."""
    books.all("ALTER TABLE commits RENAME TO gone")
    with pytest.raises(DatabaseFailed), books.ledger.transaction():
        pass
    books.all("ALTER TABLE gone RENAME TO commits")
    books.begin(1)


# Its name


SECRETS = (
    "postgresql://enrich:hunter2@{}/enrich",
    "postgresql://enrich:hun/ter2@{}/enrich",
    "postgresql://enrich:12#hunter2@{}/enrich",
    "postgresql://enrich:12?hunter2@{}/enrich",
    "postgresql://{}/enrich?password=hunter2",
    "postgresql://{}/enrich?PASSWORD=hunter2",
    "postgresql://{}/enrich?sslpassword=hunter2",
    "postgresql://{}/en#hunter2",
    "host=127.0.0.1 password=hunter2",
)


@pytest.mark.parametrize("url", [*SECRETS[:2], *(pytest.param(url, marks=pytest.mark.long) for url in SECRETS[2:])])
def test_a_password_is_refused_wherever_a_ledger_is_named(
    office: Office, api: Api, postgres: Postgres, tmp_path: Path, url: str
) -> None:
    """In the job file, as an option, in the environment, as an argument; and nobody repeats it."""
    url = url.format(f"127.0.0.1:{postgres.port}")
    office.write_leads(people(1))
    plain = Office(office.folder)
    told = [
        plain.command("run", "job.yaml", "--log-file", "log", "--ledger", url, api=api),
        plain.command("status", "job.yaml", "--ledger", url),
        plain.command("run", "job.yaml", "--log-file", "log", api=api, ENRICH_LEDGER=url),
        plain.command("cron", "job.yaml", "--at", "02:00", ENRICH_LEDGER=url),
        plain.command("ledger", "check", url),
        plain.command("ledger", "copy", url, "copy.db"),
    ]
    plain.write_job(ledger=f'"{url}"')
    told.append(plain.command("run", "job.yaml", "--log-file", "log", api=api))

    assert [done.code for done in told] == [Exit.USAGE] * len(told), [done.stderr for done in told]
    assert all("set PGPASSWORD" in done.stderr for done in told)
    said = "".join(done.stdout + done.stderr for done in told)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != plain.job_file)
    assert "hunter2" not in said
    assert "ter2" not in said
    assert b"ter2" not in written
    assert api.audit()["accepted"] == 0


@in_turn(
    "url",
    [
        "postgresql:///enrich",
        "postgresql://enrich@/enrich?host=/var/run/postgresql",
        "postgresql://en%40rich@[::1]:5432/enrich?sslmode=require",
        "postgres://one:5432,two:5433/enrich?target_session_attrs=read-write&schema=leads&lease=5",
    ],
)
def test_what_libpq_takes_names_a_ledger(url: str, tmp_path: Path) -> None:
    """As long as nothing secret is in it."""
    found = locate_ledger(tmp_path, url, tmp_path)
    assert isinstance(found, Place)
    assert str(found).partition("?")[0] == f"postgresql://{url.partition('://')[2].partition('?')[0]}"


@pytest.mark.parametrize("command", first_quick(1, ["status", "runs", "explain", "report"]))
def test_whoever_looks_finds_the_ledger_by_its_url(api: Api, office: Office, command: str) -> None:
    """An option names it as the job file would."""
    office.write_leads(people(2))
    url = str(office.server)
    plain = Office(office.folder, environ=office.environ)
    plain.write_job()
    assert plain.command("run", "job.yaml", "--ledger", url, api=api).code == 0
    which = ("--row", "1") if command == "explain" else ()

    done = plain.command(command, "job.yaml", "--ledger", url, "--json", *which)

    assert done.code == 0, done.stderr
    assert "found" in done.stdout
    assert not (plain.folder / f"postgresql:{os.sep}").exists()
