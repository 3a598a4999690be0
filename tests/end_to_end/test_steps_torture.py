"""Kills a job with four steps again and again, while the API has every kind of fault, and compares bill and file."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest

from enrich.models import State
from enrich.run.context import RunOptions
from enrich.sandbox import Fault, SandboxSettings
from tests.end_to_end.test_steps import HEADER, credits_of, make_people
from tests.end_to_end.test_steps_by_hand import STEPS
from tests.support.torture import ALLOWED_EXIT_CODES, FAULTS, MAX_IN_DOUBT
from tests.support.workspace import SHORT_TIMEOUTS, Workspace, kill_process, serve_api

pytestmark = pytest.mark.long

JOB = (
    "version: 1\ninput: leads.csv\noutput: out.csv\nsteps:\n"
    + "".join(f"  - name: {name}{STEPS[name].rstrip()}\n" for name in ("company", "email", "verify", "phone"))
    + "complete: [work_email]\nlimits: {requests_per_second: 400}\npolicy: {max_attempts: 6}\n"
)


def question(target: Mapping[str, Any], params: Mapping[str, str]) -> str:
    """Return a text that names a question, to the API and in the ledger."""
    name = target.get("waterfall") or target.get("enrichment")
    return json.dumps([str(name), dict(params)], sort_keys=True)


@pytest.mark.parametrize(("backend", "seed"), [("file", 3), ("server", 8)])
def test_torture_of_four_steps(tmp_path: Path, workspace: Workspace, seed: int) -> None:
    """Nothing is paid twice, nothing is lost, and the file's sum is the API's bill, whenever the run is killed."""
    rng = random.Random(seed)
    workspace.write_job(JOB)
    workspace.write_leads(make_people(40, 14), HEADER)
    settings = SandboxSettings(
        latency="lognormal(0.4,0.6)",
        seed=seed,
        fault_seed=seed,
        no_data_seconds=0.5,
        faults=tuple(map(Fault.parse, FAULTS)),
    )
    with serve_api(tmp_path / "api.db", settings) as api:
        for _ in range(7):
            process = workspace.start_subprocess("run", "job.yaml", api=api)
            with suppress(TimeoutExpired):
                process.wait(1.2 + 3 * rng.random())
            kill_process(process)
        deadline = time.monotonic() + 120
        while True:
            summary = workspace.run_job(api, timing=SHORT_TIMEOUTS)
            assert summary.exit_code in ALLOWED_EXIT_CODES
            # A task that was unknown for a while is polled again by the next run. Requests in doubt hold the rest.
            is_expired = any(step["expired"] for step in summary.steps)
            if not is_expired and (not summary.pending or (summary.exit_code == 14 and summary.submitted == 0)):
                break
            assert time.monotonic() < deadline
        audit = api.audit()
        requests = [
            (question(json.loads(call), json.loads(params)), state, is_priced)
            for call, params, state, is_priced in workspace.sql(
                "SELECT c.canonical, r.params, r.state, a.credits IS NOT NULL FROM requests r "
                "JOIN calls c ON c.id = r.call_id LEFT JOIN attempts a ON a.id = r.attempt_id"
            )
        ]
        known = {name: state for name, state, _ in requests}
        # The API has named no price that can be right, or none yet.
        unpriced = {name for name, _, is_priced in requests if not is_priced}
        in_doubt = [name for name, state in known.items() if state == "in_doubt"]
        answered = {"found", "not_found", "failed"}
        lost = [
            run
            for run in audit["runs"]
            if known[question(run, run["params"])] not in answered and question(run, run["params"]) not in in_doubt
        ]
        bill = sum(run["credits"] for run in audit["runs"] if question(run, run["params"]) not in unpriced)

        assert audit["paid_twice"] == 0
        assert not lost
        assert len(in_doubt) <= 7 * MAX_IN_DOUBT
        assert credits_of(workspace.read_output()) == pytest.approx(bill, abs=1e-6)

        api.clear_faults()
        for _ in range(6):
            summary = workspace.run_job(api, RunOptions(retry=frozenset({State.IN_DOUBT})), timing=SHORT_TIMEOUTS)
        assert summary.pending == summary.in_doubt == 0
        assert len(workspace.read_output()) == 40


def test_killed_runs_of_a_plan(tmp_path: Path, workspace: Workspace) -> None:
    """Killed runs of a saved plan send each request of its first step once, and stay below its ceilings."""
    workspace.write_job(JOB)
    workspace.write_leads(make_people(60, 40), HEADER)
    settings = SandboxSettings(latency="fixed(0.3)", failure_rate=0.0)
    with serve_api(tmp_path / "api.db", settings) as api:
        arguments = ("plan", "job.yaml", "--limit", "30", "-o", "night.plan", "--json")
        plan = workspace.run_in_process(*arguments, api=api).json_output
        assert plan["steps"][0]["to_submit"] == 30
        for seconds in (1.0, 1.4, 1.8, 2.2):
            process = workspace.start_subprocess("run", "job.yaml", "--plan", "night.plan", api=api)
            with suppress(TimeoutExpired):
                process.wait(seconds)
            kill_process(process)
        for _ in range(3):
            result = workspace.run_in_process("run", "job.yaml", "--plan", "night.plan", "--json", api=api).json_output
        sent = dict(
            workspace.sql("SELECT step, count(DISTINCT request_id) FROM attempts WHERE state <> 'refused' GROUP BY 1")
        )
        assert api.audit()["paid_twice"] == 0
    assert result["submitted"] == 0
    assert sent["company"] == 30
    assert all(sent.get(step["name"], 0) <= step["at_most"] for step in plan["steps"])
