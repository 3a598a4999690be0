"""The server restarts while processes write and read: nothing is lost and nothing is written twice."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from enrich.job.locations import LedgerLocation, parse_ledger_location
from enrich.ledger import records
from enrich.ledger.verify import check_ledger
from enrich.ledger.writer import LedgerWriter
from tests.support.ledger import CommittingLedger
from tests.support.postgres import PostgresServer
from tests.support.workspace import SandboxApi, Workspace, kill_process, make_leads, serve_api, wait_until


@pytest.fixture
def ledger_location(own_postgres: PostgresServer, tmp_path: Path) -> LedgerLocation:
    """Return a location on a server that may be restarted."""
    return parse_ledger_location(tmp_path, own_postgres.ledger_url(), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_restart_between_transitions(
    ledger: CommittingLedger, own_postgres: PostgresServer, how: Literal["fast", "immediate"]
) -> None:
    """A transition that finds its connection closed before it wrote anything is repeated."""

    async def scenario() -> None:
        async with LedgerWriter(ledger.wrapped) as writer:
            await writer.submit(records.start_execution, "before", None, 1)
            await asyncio.to_thread(own_postgres.restart, how)
            await writer.submit(records.start_execution, "after", None, 2)

    asyncio.run(scenario())

    assert ledger.query_all("SELECT job FROM executions ORDER BY id") == [("before",), ("after",)]


@pytest.mark.long
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_no_duplicate_transition_after_lost_commit(
    ledger: CommittingLedger, own_postgres: PostgresServer, how: Literal["fast", "immediate"]
) -> None:
    """After a lost connection, the server shows whether a commit was made, so no transition is made twice."""
    stop = threading.Event()
    made: list[str] = []

    def reached(number: int) -> bool:
        return len(made) > number

    async def submit_until_stopped(writer: LedgerWriter, task_number: int) -> None:
        while not stop.is_set():
            name = f"{task_number} {len(made)}"
            made.append(name)
            await writer.submit(records.start_execution, name, None, 1)

    async def restart_server() -> None:
        for _ in range(3):
            enough = len(made) + 50
            await asyncio.to_thread(wait_until, partial(reached, enough))
            await asyncio.to_thread(own_postgres.restart, how)
        stop.set()

    async def scenario() -> None:
        async with LedgerWriter(ledger.wrapped) as writer:
            await asyncio.gather(
                restart_server(), *(submit_until_stopped(writer, task_number) for task_number in range(5))
            )

    asyncio.run(scenario())

    assert sorted(name for (name,) in ledger.query_all("SELECT job FROM executions")) == sorted(made)


@pytest.mark.long
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_run_survives_server_restarts(
    tmp_path: Path, own_postgres: PostgresServer, how: Literal["fast", "immediate"]
) -> None:
    """After two restarts and an outage of the server, every lead is answered and none is paid for twice."""
    workspace = Workspace(tmp_path, f"{own_postgres.ledger_url()}&lease=3", own_postgres.environ)
    workspace.write_job(limits="{requests_per_second: 60}")
    workspace.write_leads(make_leads(150))
    with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.5)") as api:
        process = workspace.start_subprocess("run", "job.yaml", "--json", api=api)
        try:
            for enough in (30, 70):
                wait_until(partial(requests_sent, api, enough))
                own_postgres.restart(how)
            wait_until(partial(requests_sent, api, 100))
            own_postgres.stop(how)
            time.sleep(2)
            own_postgres.start()
            out, err = process.communicate(timeout=60)
        finally:
            kill_process(process)
        audit = api.audit()

    assert process.returncode == 0, err
    summary = json.loads(out)
    assert (summary["rows"], summary["submitted"], summary["in_doubt"], summary["pending"]) == (150, 150, 0, 0)
    assert (audit["accepted"], audit["accepted_more_than_once"], audit["paid_twice"]) == (150, 0, 0)
    assert check_ledger(workspace.ledger_location).problems == []


def requests_sent(api: SandboxApi, enough: int) -> bool:
    """Return whether at least `enough` requests were sent."""
    return bool(api.audit()["requests"].get("run", 0) >= enough)
