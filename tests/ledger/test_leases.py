"""Leases on a PostgreSQL server: workers stop with their run, and maintenance waits for all lease holders."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from enrich.errors import LedgerLocked, RunEnded
from enrich.exit_codes import ExitCode
from enrich.job.locations import LedgerLocation, parse_ledger_location
from enrich.job.locations import PostgresLocation as Place
from enrich.ledger import lease_table, queue, records, resume
from enrich.ledger.database import Database, ledger_exists
from enrich.ledger.database_copy import copy_ledger
from enrich.ledger.dialect import DatabaseFailed
from enrich.ledger.lock import Lease, open_exclusive, open_for_run, open_leased
from enrich.ledger.verify import check_ledger
from tests.support.cases import in_turn
from tests.support.ledger import MAX_PRICE, CommittingLedger, run_sql
from tests.support.postgres import PostgresServer
from tests.support.workspace import SandboxApi, Workspace, make_leads, wait_until


@pytest.fixture
def backend() -> str:
    """Use PostgreSQL only: SQLite files have no leases."""
    return "server"


@pytest.fixture
def server_ledger(ledger_location: LedgerLocation) -> Place:
    """Make a ledger on a server."""
    assert isinstance(ledger_location, Place)
    Database(ledger_location).close()
    return ledger_location


@pytest.fixture
def worker(server_ledger: Place) -> Iterator[tuple[Database, Lease]]:
    """Return a worker of a killed run: the lock is free, and its leader's lease has ended."""
    with ExitStack() as run, ExitStack() as stack:
        _, leader = run.enter_context(open_for_run(server_ledger))
        assert leader is not None
        worker = stack.enter_context(open_leased(server_ledger, leader_id=leader.fencing_token.lease_id))
        run.close()
        yield worker


# Workers and the leader of their run


@pytest.mark.long
def test_worker_cannot_lease_after_run_ended(server_ledger: Place) -> None:
    """A worker that resumes after its run ended can't get a lease, because the next run may have started."""
    with open_for_run(server_ledger) as (_, leader):
        assert leader is not None
        with open_leased(server_ledger, leader_id=leader.fencing_token.lease_id) as (ledger, lease):
            assert lease.is_valid()
            assert [other.is_leader for other in lease_table.other_holders(ledger)] == [True]
    with pytest.raises(RunEnded), open_leased(server_ledger, leader_id=leader.fencing_token.lease_id):
        pass
    assert run_sql(server_ledger, "SELECT count(*) FROM leases") == [(0,)]


@pytest.mark.long
def test_dismissed_worker_cannot_lease(server_ledger: Place) -> None:
    """A worker can't get a lease when another process has revoked its leader's."""
    with open_for_run(server_ledger) as (_, leader):
        assert leader is not None
        other = Database(server_ledger)
        lease_table.revoke_leases(other, lease_table.other_holders(other))
        other.close()
        with pytest.raises(RunEnded), open_leased(server_ledger, leader_id=leader.fencing_token.lease_id):
            pass


@pytest.mark.long
def test_new_run_sees_remaining_workers(server_ledger: Place) -> None:
    """A new run sees a worker that is just starting under an expired leader's lease, so it does not start alone."""
    leader, new_worker, observer = (Database(server_ledger) for _ in range(3))
    with leader.transaction():
        number = lease_table.acquire_lease(leader, "leader", 30)
    run_sql(server_ledger, "UPDATE leases SET lease_until = now() - interval '1 s', seconds = 1e-9")
    new_worker.session.begin()
    lease_table.acquire_lease(new_worker, "worker", 30, leader_id=number)
    assert [owner.name for owner in lease_table.other_holders(observer)] == ["leader"]
    new_worker.session.commit()
    assert [owner.name for owner in lease_table.other_holders(observer)] == ["worker"]
    for each in (leader, new_worker, observer):
        each.close()


# What a crash leaves


@pytest.mark.long
def test_lease_may_end_during_recovery(ledger: CommittingLedger, ledger_location: LedgerLocation) -> None:
    """When a lease ends during recovery, a request and its attempt go in doubt together or not at all."""
    assert isinstance(ledger_location, Place)
    ledger.start_and_enroll(1, 2, 3, 4, 5, 6, 7, 8)
    result = 0
    for moment in range(1, 5):
        with open_for_run(ledger_location) as (_, leader):
            assert leader is not None
            holder = Database(ledger_location, fencing_token=leader.fencing_token)
            with holder.transaction():
                queue.claim(holder, ledger.execution, MAX_PRICE, ledger.now)
            _before_statement(ledger.wrapped, moment, lambda: run_sql(ledger_location, "DELETE FROM leases"))
            ledger.commit(resume.recover, ledger.now)
            assert check_ledger(ledger_location).problems == []
            holder.close()
        result += ledger.commit(resume.recover, ledger.now)
        assert check_ledger(ledger_location).problems == []
    assert ledger.query_all("SELECT attempt_count FROM requests WHERE state = 'in_doubt'") == [(1,)] * 4
    assert result < 4  # some were found by the first recovery


def _before_statement(ledger: Database, statement_number: int, action: Callable[[], object]) -> None:
    """Run `action` before the given next statement of a ledger."""
    execute, remaining = ledger.session.execute, [statement_number]

    def execute_after_action(sql: str, values: Sequence[Any] = (), /) -> Any:
        remaining[0] -= 1
        if remaining[0] == 0:
            action()
        return execute(sql, values)

    ledger.session.execute = execute_after_action  # type: ignore[method-assign]


# Concurrent writers


@pytest.mark.long
def test_run_that_another_process_claims_for_is_kept(ledger: CommittingLedger, ledger_location: LedgerLocation) -> None:
    """A run is not deleted as unused while another process claims a request for it."""
    ledger.start_and_enroll(1)
    pid = ledger.wrapped.session._connection.info.backend_pid  # type: ignore[union-attr]
    with closing(Database(ledger_location)) as other, ThreadPoolExecutor() as threads:
        with other.transaction():
            assert queue.claim(other, ledger.execution, 0, ledger.now)
            deletion = threads.submit(ledger.commit, records.delete_unless_used, ledger.execution)
            wait_until(
                lambda: bool(run_sql(ledger_location, "SELECT 1 FROM pg_locks WHERE NOT granted AND pid = ?", pid))
            )
        assert not deletion.result()


# Maintenance without an active run


@pytest.mark.long
def test_exclusive_access_waits_for_workers(server_ledger: Place, worker: tuple[Database, Lease]) -> None:
    """Exclusive access waits for a worker although the lock is free: it may still send its claims."""
    assert worker[1].is_valid()
    with (
        pytest.raises(LedgerLocked, match="processes of an earlier run have not ended yet"),
        open_exclusive(server_ledger),
    ):
        pass


@pytest.mark.long
def test_exclusive_access_is_visible_to_runs(server_ledger: Place) -> None:
    """Exclusive access has a leader's lease, so runs see it even when the server has lost the lock."""
    with open_exclusive(server_ledger), closing(Database(server_ledger)) as other:
        assert [owner.is_leader for owner in lease_table.other_holders(other)] == [True]


@pytest.mark.long
def test_copy_waits_for_workers(server_ledger: Place, worker: tuple[Database, Lease], tmp_path: Path) -> None:
    """Copying waits for workers; otherwise the new ledger would buy their requests again."""
    assert worker[1].is_valid()
    with pytest.raises(LedgerLocked):
        copy_ledger(server_ledger, tmp_path / "copy.db")
    assert not ledger_exists(tmp_path / "copy.db")


@pytest.mark.long
@pytest.mark.parametrize("command", [("forget", "--match", "First Name=First1"), ("purge", "--older-than", "0s")])
def test_erasing_waits_for_workers(api: SandboxApi, workspace: Workspace, command: tuple[str, ...]) -> None:
    """Erasing waits for workers; otherwise their later writes would bring the data back."""
    workspace.write_leads(make_leads(2))
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    assert isinstance(workspace.ledger_location, Place)
    with open_for_run(workspace.ledger_location) as (_, leader):
        assert leader is not None
        result = workspace.run_in_process(command[0], "job.yaml", *command[1:], "--yes")
    again = workspace.run_in_process(command[0], "job.yaml", *command[1:], "--yes")

    assert (result.exit_code, again.exit_code) == (ExitCode.LOCKED, 0), (result.stderr, again.stderr)


# The server's clock


@pytest.mark.long
def test_leases_use_server_time(server_ledger: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases use the server's time, so a wrong local clock has no effect."""
    with open_for_run(server_ledger) as (ledger, lease):
        assert lease is not None
        hours_ago = time.time_ns() - 10**9 * 7200
        monkeypatch.setattr(time, "time_ns", lambda: hours_ago)
        assert abs(lease.now_ms() - lease_table.now_ms(ledger)) < 60_000


@pytest.mark.long
def test_failed_begin_is_harmless(ledger: CommittingLedger) -> None:
    """After a BEGIN that failed, the connection works for the next transaction."""
    ledger.query_all("ALTER TABLE commits RENAME TO gone")
    with pytest.raises(DatabaseFailed), ledger.wrapped.transaction():
        pass
    ledger.query_all("ALTER TABLE gone RENAME TO commits")
    ledger.start_and_enroll(1)


# The ledger's URL


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


@pytest.mark.long
@pytest.mark.parametrize("url", SECRETS)
def test_password_in_url_is_refused(
    workspace: Workspace, api: SandboxApi, postgres: PostgresServer, tmp_path: Path, url: str
) -> None:
    """A password in the URL is refused in the job file, an option, the environment or an argument, and not shown."""
    url = url.format(f"127.0.0.1:{postgres.port}")
    workspace.write_leads(make_leads(1))
    plain = Workspace(workspace.folder)
    result = [
        plain.run_in_process("run", "job.yaml", "--log-file", "log", "--ledger", url, api=api),
        plain.run_in_process("status", "job.yaml", "--ledger", url),
        plain.run_in_process("run", "job.yaml", "--log-file", "log", api=api, ENRICH_LEDGER=url),
        plain.run_in_process("cron", "job.yaml", "--at", "02:00", ENRICH_LEDGER=url),
        plain.run_in_process("ledger", "check", url),
        plain.run_in_process("ledger", "copy", url, "copy.db"),
    ]
    plain.write_job(ledger=f'"{url}"')
    result.append(plain.run_in_process("run", "job.yaml", "--log-file", "log", api=api))

    assert [done.exit_code for done in result] == [ExitCode.USAGE] * len(result), [done.stderr for done in result]
    assert all("set PGPASSWORD" in done.stderr for done in result)
    message = "".join(done.stdout + done.stderr for done in result)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != plain.job_file)
    assert "hunter2" not in message
    assert "ter2" not in message
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
def test_libpq_url_forms(url: str, tmp_path: Path) -> None:
    """Other libpq URLs are accepted as long as they contain no secret."""
    found = parse_ledger_location(tmp_path, url, tmp_path)
    assert isinstance(found, Place)
    assert str(found).partition("?")[0] == f"postgresql://{url.partition('://')[2].partition('?')[0]}"


@pytest.mark.long
@pytest.mark.parametrize("command", ["status", "runs", "explain", "report"])
def test_ledger_option_finds_server_ledger(api: SandboxApi, workspace: Workspace, command: str) -> None:
    """The `--ledger` option finds a server ledger like the job file's key."""
    workspace.write_leads(make_leads(2))
    url = str(workspace.server_url)
    plain = Workspace(workspace.folder, environ=workspace.environ)
    plain.write_job()
    assert plain.run_in_process("run", "job.yaml", "--ledger", url, api=api).exit_code == 0
    which = ("--row", "1") if command == "explain" else ()

    result = plain.run_in_process(command, "job.yaml", "--ledger", url, "--json", *which)

    assert result.exit_code == 0, result.stderr
    assert "found" in result.stdout
    assert not (plain.folder / f"postgresql:{os.sep}").exists()
