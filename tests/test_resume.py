"""Power cuts: the program dies at any point and is started again; nothing is paid twice, nothing paid for is lost."""

from __future__ import annotations

import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enrich.receipt import Receipt
from enrich.store.records import check
from enrich.surroundings import Options
from tests.cases import first_quick
from tests.harness import BOTH_IN_TIME, Api, Office, kill, people, serving, until

OLD = "the output of an older night\n"
ON_THE_WIRE = 64  # the most that a kill may leave in doubt


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def cut(office: Office, api: Api, ready: Callable[[], bool], *arguments: str) -> None:
    """Start the program and kill it the moment something is so."""
    process = office.start("run", "job.yaml", *arguments, api=api)
    try:
        until(ready)
    finally:
        kill(process)


def requests(api: Api, name: str) -> int:
    """Count the requests of a kind."""
    return int(api.audit()["requests"].get(name, 0))


def reconciled(office: Office, api: Api, receipt: Receipt, leads: int) -> dict[str, Any]:
    """Hold the output against the API's own books: nothing twice, nothing lost, nothing untold."""
    audit = api.audit()
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    assert (receipt.in_doubt or 0) <= ON_THE_WIRE
    output = office.output()
    assert [row["First Name"] for row in output] == [f"First{number}" for number in range(leads)]
    doubtful = {row["First Name"] for row in output if row["enrich_status"] == "in_doubt"}
    told = {row["enrich_task_id"] for row in output if row["enrich_task_id"]}
    for run in audit["runs"]:
        assert set(run["task_ids"].split() if isinstance(run["task_ids"], str) else run["task_ids"]) <= told or (
            run["params"]["first_name"] in doubtful
        )
    assert Counter(row["enrich_status"] for row in output)["pending"] == receipt.pending == 0
    return audit


@pytest.mark.long
def test_killed_before_the_first_post(api: Api, office: Office) -> None:
    """Nothing was sent, so nothing is in doubt and the next run is like the first."""
    office.write_leads(people(20))
    api.fault("slow", 1, "waterfalls", seconds=30)
    cut(office, api, lambda: requests(api, "waterfalls") == 1)

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.submitted, receipt.in_doubt) == (0, 20, 0)
    reconciled(office, api, receipt, 20)


@pytest.mark.parametrize("fault", first_quick(1, ["silence-after", "silence-before"]))
def test_killed_while_posts_are_on_the_wire(api: Api, office: Office, fault: str) -> None:
    """What had left is in doubt, at most 64, whether it was accepted or not; the others are bought once."""
    office.write_leads(people(150))
    api.fault(fault, 40)
    cut(office, api, lambda: api.audit()["faults"].get(fault, 0) >= 20)
    on_the_wire = api.audit()["faults"][fault]
    api.heal()

    receipt = office.run(api)

    assert receipt.exit_code == 14
    assert on_the_wire <= (receipt.in_doubt or 0) <= ON_THE_WIRE
    assert receipt.submitted == 150 - (receipt.in_doubt or 0)
    assert any("killed" in note for note in receipt.notes)
    audit = reconciled(office, api, receipt, 150)
    assert audit["accepted"] == receipt.submitted + (on_the_wire if fault == "silence-after" else 0)


@pytest.mark.long
def test_killed_while_answers_stream_in(tmp_path: Path, office: Office) -> None:
    """In the thick of it, POSTs and polls side by side, three times over."""
    office.write_job(limits="{requests_per_second: 400}")
    office.write_leads(people(160))
    with serving(tmp_path / "api.db", latency="uniform(0.05,0.6)", failure_rate=0.05, free_failures=0.0) as api:
        for bought in (40, 80, 120):
            cut(office, api, lambda bought=bought: requests(api, "run") >= bought)  # type: ignore[misc]
        receipt = office.run(api)
        audit = reconciled(office, api, receipt, 160)

    assert (receipt.in_doubt or 0) + len({run["params"]["first_name"] for run in audit["runs"]}) >= 160


def test_killed_while_polling(tmp_path: Path, office: Office) -> None:
    """All was bought, no answer was there yet: the next run fetches every one and buys nothing."""
    office.write_leads(people(40))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        cut(office, api, lambda: requests(api, "task") >= 40)
        api.advance(120)

        receipt = office.run(api)

        reconciled(office, api, receipt, 40)
    assert (receipt.exit_code, receipt.submitted, receipt.in_doubt) == (0, 0, 0)
    assert (receipt.found or 0) + (receipt.not_found or 0) == 40


@pytest.mark.long
def test_killed_while_writing_the_output(api: Api, office: Office) -> None:
    """The old output stays whole until the new one is; what a kill left half-written is gone after the next run."""
    leads = [lead for _ in range(3_000) for lead in people(10)]
    office.write_leads(leads)
    old = office.folder / "out.csv"
    old.write_text(OLD)
    part = office.folder / ".job.enrich-part"
    cut(office, api, part.exists)
    assert part.exists()
    assert old.read_text() == OLD

    receipt = office.run(api)

    assert (receipt.exit_code, receipt.rows, receipt.submitted) == (0, 30_000, 0)
    assert len(office.output()) == 30_000
    assert not part.exists()
    assert api.audit()["accepted"] == 10


def test_a_stale_part_is_gone_even_when_the_night_fails(api: Api, office: Office) -> None:
    """The next start removes it whatever comes of that start."""
    office.write_leads(people(1))
    part = office.folder / ".job.enrich-part"
    part.write_text("half a fi")
    api.fault("unauthorized", 1, "post")

    receipt = office.run(api)

    assert receipt.exit_code == 3
    assert not part.exists()


@pytest.mark.long
def test_killed_again_and_again_at_random(tmp_path: Path, office: Office) -> None:
    """Kills at whatever it is doing then, and one run to the end."""
    office.write_job(limits="{requests_per_second: 300}")
    office.write_leads(people(120))
    with serving(tmp_path / "api.db", latency="uniform(0.01,0.3)") as api:
        for number in range(4):
            process = office.start("run", "job.yaml", api=api)
            time.sleep(0.55 + 0.13 * number)
            kill(process)
        receipt = office.run(api)
        reconciled(office, api, receipt, 120)

    assert receipt.exit_code in (0, 14)


@pytest.mark.long
def test_the_books_of_a_killed_run_balance(api: Api, office: Office) -> None:
    """Over all executions the ledger's credits are the API's, except for what is in doubt and unknown."""
    office.write_leads(people(60))
    cut(office, api, lambda: requests(api, "task") >= 5)

    office.run(api)

    ledger = office.ledger()
    try:
        spent, unknown = ledger.totals()
        executions = ledger.executions()
    finally:
        ledger.close()
    assert [row["exit_code"] is None for row in executions] == [False, True]
    doubtful = [row["First Name"] for row in office.output() if row["enrich_status"] == "in_doubt"]
    known = [run["credits"] for run in api.audit()["runs"] if run["params"]["first_name"] not in doubtful]
    assert unknown == 0
    assert spent / 1e6 == pytest.approx(sum(known))
    assert sum(row["spent"] for row in executions) == spent


@pytest.mark.long
def test_a_cap_holds_over_what_a_killed_run_left_in_flight(tmp_path: Path, office: Office) -> None:
    """What is at the API from before counts against the cap of the execution that collects it."""
    office.write_leads(people(30))
    with serving(tmp_path / "api.db", latency="fixed(60)") as api:
        cut(office, api, lambda: requests(api, "task") >= 10, "--limit", "10")
        before = api.audit()["accepted"]
        assert before == 10
        office.write_job(limits="{max_credits: 36}")

        receipt = office.run(api, Options(max_time_s=1.0))

        assert api.audit()["accepted"] - before <= 0
    assert receipt.submitted == 0
    assert receipt.pending == 30


@pytest.mark.long
def test_the_api_restarts_in_the_middle(tmp_path: Path, office: Office) -> None:
    """Refused connections are sat out, what the API had accepted it still knows, nothing is bought twice."""
    office.write_job(limits="{requests_per_second: 400}")
    office.write_leads(people(150))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state = tmp_path / "api.db"
    with serving(state, port=port, latency="fixed(0.5)") as api:
        process = office.start("run", "job.yaml", "--json", api=api)
        until(lambda: requests(api, "run") >= 40)
    time.sleep(0.5)
    with serving(state, port=port, latency="fixed(0.5)") as api:
        try:
            _, err = process.communicate(timeout=20)
        finally:
            kill(process)
        receipt = office.run(api)
        reconciled(office, api, receipt, 150)

    assert process.returncode in (0, 14), err
    assert receipt.submitted == 0


@pytest.mark.long
def test_the_ledger_of_a_killed_run_is_sound(api: Api, office: Office) -> None:
    """SQLite finds nothing wrong after a kill, and status can be read at once."""
    office.write_leads(people(100))
    cut(office, api, lambda: requests(api, "run") >= 30)

    done = office.command("status", "job.yaml", "--json")

    assert done.code == 0
    assert done.receipt["executions"][0]["ended_at"] is None
    assert check(office.place).problems == []


@pytest.mark.long
def test_two_starts_at_once_are_one_execution(tmp_path: Path, office: Office) -> None:
    """Of two crons that meet, one works and the other leaves with exit 11, at a server after a moment."""
    office.write_leads(people(10))
    with serving(tmp_path / "api.db", latency="fixed(5)" if office.server else "fixed(1)") as api:
        both = [office.start("run", "job.yaml", api=api) for _ in range(2)]
        codes = sorted(_ended(process) for process in both)
        audit = api.audit()

    assert codes == [0, 11]
    assert (audit["accepted"], audit["paid_twice"]) == (10, 0)


def _ended(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=30)
    return process.returncode
