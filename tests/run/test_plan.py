"""`enrich plan` predicts what a run does, and changes nothing."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.commands.plan import make_plan
from enrich.errors import CommandRefused, EnrichError, JobError, LedgerLocked
from enrich.job.job import load_job
from enrich.ledger.database import ledger_exists
from enrich.ledger.lock import lock_ledger
from enrich.models import DECISIONS_TO_SEND, Decision, State
from enrich.run.context import RunOptions
from enrich.run.plan import Plan
from enrich.run.plan_file import SavedPlan, read_plan, write_plan
from tests.support.cases import examples, first_quick
from tests.support.workspace import (
    BOTH_BACKENDS,
    JOB,
    STEP_JOB,
    ProgramResult,
    SandboxApi,
    Workspace,
    make_leads,
    serve_api,
)

#: The maximum price of one request of the standard job, in credits.
MAX_PRICE = 3.51
PAID_DECISIONS = {decision.value for decision in DECISIONS_TO_SEND}


def plan_in_process(
    workspace: Workspace, api: SandboxApi, options: RunOptions | None = None, rows: Path | None = None
) -> Plan:
    """Make a plan in this process."""
    plan, _ = make_plan(load_job(workspace.job_file), api.access, options or RunOptions(), rows)
    assert isinstance(plan, Plan)
    return plan


def saved_plan(
    workspace: Workspace, api: SandboxApi, options: RunOptions | None = None, rows: Path | None = None
) -> SavedPlan:
    """Make a plan that a run can follow."""
    _, kept = make_plan(load_job(workspace.job_file), api.access, options or RunOptions(), rows)
    assert kept is not None
    return kept


def run_plan_command(workspace: Workspace, api: SandboxApi, *arguments: str) -> ProgramResult:
    """Run `enrich plan` on the job."""
    return workspace.run_in_process("plan", "job.yaml", *arguments, api=api)


def read_decisions(path: Path) -> list[dict[str, str]]:
    """Read the file that `--rows` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def accepted_counts(api: SandboxApi) -> dict[str, int]:
    """Count the accepted runs by first name, which identifies the request."""
    return {run["params"]["first_name"]: run["accepted"] for run in api.audit()["runs"]}


def alter_ledger(workspace: Workspace, sql: str) -> None:
    """Change the ledger with SQL."""
    workspace.sql(sql)


# The plan equals the run


@dataclass(frozen=True)
class PlanCase:
    """Leads by number (None: an invalid row), what happened before, and the options of this run."""

    leads: list[int | None]
    history: list[tuple[str, int]] = field(default_factory=list)
    options: RunOptions = field(default_factory=RunOptions)
    job: dict[str, str] = field(default_factory=dict)


CASES = st.builds(
    PlanCase,
    leads=st.lists(st.one_of(st.integers(0, 9), st.none()), max_size=14),
    history=st.lists(
        st.tuples(st.sampled_from(["limit", "sample", "doubt", "age", "submitting"]), st.integers(1, 4)), max_size=3
    ),
    options=st.builds(
        dict,
        limit=st.one_of(st.none(), st.integers(0, 6)),
        sample=st.one_of(st.none(), st.integers(1, 6), st.just(10**12)),
        seed=st.integers(0, 3),
        retry=st.frozensets(st.sampled_from([State.FAILED, State.IN_DOUBT])),
    ).map(lambda chosen: RunOptions(**chosen)),
    job=st.fixed_dictionaries(
        {},
        optional={
            "caps": st.sampled_from(["{by: Note, max: 1}", "{by: company, max: 2}"]),
            "order_by": st.just("[Note, Website]"),
            "where": st.just("Note <> 'g2'"),
            "policy": st.just("{refresh: {found: 5d, not_found: 3d}}"),
            "canary": st.just("{rows: 100, min_hit_rate: 1}"),
        },
    ),
)


@contextmanager
def make_history(api: SandboxApi, case: PlanCase, number: int) -> Iterator[Workspace]:
    """Make a workspace with this history; `number` keeps the leads of different cases apart."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        workspace.write_leads([make_lead(number, each) for each in case.leads])
        for what, count in case.history:
            workspace.write_job()
            if what == "doubt":
                api.inject_fault("error-after", count)
                workspace.run_job(api, RunOptions(limit=count))
                api.clear_faults()
            elif what in ("limit", "sample"):
                workspace.run_job(api, RunOptions(limit=count) if what == "limit" else RunOptions(sample=count))
            elif ledger_exists(workspace.ledger_location):
                alter_ledger(workspace, HISTORY[what].format(count=count))
        workspace.write_job(**case.job)
        yield workspace


HISTORY = {
    "age": "UPDATE attempts SET settled_ms = settled_ms - 345600000 WHERE id % 3 <> {count} % 3",
    # As a kill -9 leaves it: the attempt is stored, its POST in flight.
    "submitting": "UPDATE attempts SET state = 'submitting', settled_ms = NULL WHERE state = 'in_doubt' "
    "AND id = (SELECT attempt_id FROM requests WHERE attempt_id = attempts.id AND state = 'in_doubt')",
}


def make_lead(case: int, number: int | None) -> list[str]:
    """Make a row; half of the companies are shared by two leads."""
    if number is None:
        return ["Nobody", "", "https://nobody.example", "", "g0"]
    return [f"P{case}x{number}", "Lead", f"https://c{number // 2}.example", "", f"g{number % 4}"]


@pytest.fixture(scope="module")
def mixed_api() -> Iterator[SandboxApi]:
    """Serve an API that finds, misses and fails."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_api(Path(folder) / "api.db", failure_rate=0.2, free_failures=0.0, hit_rate=0.6) as api,
    ):
        yield api


_case_numbers = iter(range(10**6))


@pytest.mark.long
@settings(max_examples=examples(8), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, frozen=st.booleans())
def test_plan_matches_run(mixed_api: SandboxApi, case: PlanCase, *, frozen: bool) -> None:
    """For any input and history, the run decides as planned, sends the same requests, and stays below the maximum."""
    with make_history(mixed_api, case, next(_case_numbers)) as workspace:
        message, kept = make_plan(
            load_job(workspace.job_file), mixed_api.access, case.options, workspace.folder / "rows.csv"
        )
        assert isinstance(message, Plan)
        rows = read_decisions(workspace.folder / "rows.csv")
        before, spent = accepted_counts(mixed_api), mixed_api.audit()["credits_charged"]
        assert (message.rows, len(rows)) == (len(case.leads), len(case.leads))

        summary = workspace.run_job(mixed_api, RunOptions(plan=kept) if frozen else case.options)

        now = accepted_counts(mixed_api)
        assert {name for name in now if now[name] != before.get(name, 0)} == {
            row["First Name"] for row in rows if row["plan_decision"] in PAID_DECISIONS
        }
        assert sum(now.values()) - sum(before.values()) == message.to_submit == summary.submitted
        assert (summary.rows, summary.requests) == (message.rows, message.requests)
        assert message.cost.maximum is not None
        assert mixed_api.audit()["credits_charged"] - spent <= message.cost.maximum + 1e-9
        capped = sum(row["plan_decision"] == "capped" for row in rows)
        shown = [row for row in workspace.read_output() if row["enrich_error"].startswith("capped")]
        assert capped <= len(shown) == sum(row["enrich_status"] == "filtered" for row in shown)
        if frozen:
            assert workspace.run_job(mixed_api, RunOptions(plan=kept)).submitted == 0
        written = (workspace.folder / "out.csv").read_bytes()
        assert workspace.run_in_process("collect", "job.yaml", "--partial").exit_code == 0
        assert (workspace.folder / "out.csv").read_bytes() == written


@pytest.mark.long
@settings(max_examples=examples(6), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_interrupted_plan_is_resumed(mixed_api: SandboxApi, case: PlanCase) -> None:
    """An interrupted plan can be resumed; all its runs together send exactly the planned requests, each once."""
    with make_history(mixed_api, case, next(_case_numbers)) as workspace:
        message, kept = make_plan(
            load_job(workspace.job_file), mixed_api.access, case.options, workspace.folder / "rows.csv"
        )
        before = accepted_counts(mixed_api)
        mixed_api.inject_fault("no-credits", 1, "post")
        runs = [workspace.run_job(mixed_api, RunOptions(plan=kept))]
        mixed_api.clear_faults()
        runs += [workspace.run_job(mixed_api, RunOptions(plan=kept)) for _ in range(2)]

        now = accepted_counts(mixed_api)
        assert {name: now[name] - before.get(name, 0) for name in now if now[name] != before.get(name, 0)} == {
            row["First Name"]: 1
            for row in read_decisions(workspace.folder / "rows.csv")
            if row["plan_decision"] in PAID_DECISIONS
        }
        assert sum(run.submitted for run in runs) == message.to_submit
        assert runs[2].submitted == 0


# Why a row is paid for or not


@BOTH_BACKENDS
def test_decisions_of_all_rows(api: SandboxApi, workspace: Workspace) -> None:
    """Each row has its decision and reason: new, answered, duplicate, invalid, filtered or over the limit."""
    workspace.write_job(where="Note <> 'no'", suppress="never.txt")
    (workspace.folder / "never.txt").write_text("company3.example\n")
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)
    old, other, gone, kept, late = make_leads(5)
    unnamed = ["", "Last", "https://company9.example", "", ""]
    workspace.write_leads([old, other, [*other[:4], "again"], unnamed, [*gone[:4], "no"], kept, late])

    result = run_plan_command(workspace, api, "--rows", "rows.csv", "--limit", "1")

    assert (result.exit_code, result.stderr) == (0, "")
    decided = read_decisions(workspace.folder / "rows.csv")
    assert [(row["plan_decision"], row["plan_why"], row["plan_same_as_row"]) for row in decided] == [
        (decided[0]["plan_decision"], decided[0]["plan_why"], ""),
        ("new", "not sent yet", ""),
        ("duplicate", "same request as an earlier row: new", "2"),
        ("invalid", "first_name blank (First Name)", ""),
        ("filtered", "filtered by where", ""),
        ("filtered", "on a suppression list", ""),
        ("over_limit", "over --limit", ""),
    ]
    assert decided[0]["plan_why"].startswith(("already enriched", "no match"))
    assert float(decided[0]["plan_age_days"]) < 1
    assert decided[0]["plan_answered_at"].endswith("Z")


def test_rows_file_is_replaced(api: SandboxApi, workspace: Workspace) -> None:
    """A file written by `--rows` can be the input of another plan, whose columns replace the old ones."""
    workspace.write_leads(make_leads(2))
    run_plan_command(workspace, api, "--rows", "rows.csv")

    for _ in range(2):
        result = run_plan_command(workspace, api, "--input", "rows.csv", "--rows", "again.csv")
        assert result.exit_code == 0, result.stderr
        assert (workspace.folder / "again.csv").read_text() == (workspace.folder / "rows.csv").read_text()


@pytest.mark.parametrize("name", first_quick(2, ["rows.csv", "rows.xlsx", "rows.csv.gz", "rows.parquet", "rows.jsonl"]))
def test_rows_file_replaces_only_rows_files(api: SandboxApi, workspace: Workspace, name: str) -> None:
    """Replaces an older file of `--rows` and an empty file in every format; any other file is exit 2 and stays."""
    workspace.write_leads(make_leads(2))
    path = workspace.folder / name
    path.touch()
    for _ in range(2):
        assert run_plan_command(workspace, api, "--rows", name).exit_code == 0
    with_plan = pl.DataFrame({"plan_decision": ["new"], "plan_why": ["mine"], "Email": ["a@b.example"]})
    for content in (b"Name,Email\nAda,a@b.example\n", b"\x00\x01", with_plan.write_csv().encode()):
        path.write_bytes(content)
        result = run_plan_command(workspace, api, "--rows", name)
        assert result.exit_code == 2
        assert f"{name}: this file exists and was not written by `plan --rows`" in result.stderr
        assert path.read_bytes() == content


def test_rows_file_never_replaces_job_or_input(api: SandboxApi, workspace: Workspace) -> None:
    """A rows file that names the job, the input or the ledger is exit 2, and these files stay."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    for path in (workspace.job_file, workspace.folder / "leads.csv", workspace.ledger_path):
        before = path.read_bytes()
        assert run_plan_command(workspace, api, "--rows", str(path)).exit_code == 2
        assert path.read_bytes() == before


@pytest.mark.long
def test_rows_file_never_replaces_a_file_of_a_run(api: SandboxApi, workspace: Workspace) -> None:
    """A rows file that names an output, rejects or an output of an earlier day is exit 2, also in a sandbox run."""
    workspace.write_leads([*make_leads(2), ["", "", "", "", ""]])
    workspace.write_job(output="monday.csv", rejects="rejects.csv")
    workspace.run_job(api)
    workspace.write_job(output="out.csv", rejects="rejects.csv")
    workspace.run_job(api)
    for name in ("monday.csv", "out.csv", "rejects.csv"):
        before = (workspace.folder / name).read_bytes()
        for sandbox in ((), ("--sandbox",)):
            result = run_plan_command(workspace, api, "--rows", name, *sandbox)
            assert (workspace.folder / name).read_bytes() == before
            assert result.exit_code == (0 if sandbox and name == "monday.csv" else 2), result.stderr


def test_open_tasks_reduce_cap(tmp_path: Path, workspace: Workspace) -> None:
    """An open task of an earlier run is collected, and its price reduces what the cap allows."""
    workspace.write_job(limits="{requests_per_second: 1000, max_credits: 10}")
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        workspace.write_leads(make_leads(4))
        made_plan = plan_in_process(workspace, api)

    assert made_plan.decisions[Decision.WAITING] == 1
    assert (made_plan.to_submit, made_plan.cap_allows) == (3, 1)  # 10 - 3.51 leaves room for one at its maximum price
    assert made_plan.cost.maximum == round(10 - MAX_PRICE, 6)


@pytest.mark.parametrize(
    ("job", "cap"), first_quick(4, [(JOB, 5), (JOB, 2), (STEP_JOB, 5), (STEP_JOB, 2), (JOB, 20), (STEP_JOB, 20)])
)
def test_planned_cost_with_open_tasks(tmp_path: Path, workspace: Workspace, job: str, cap: float) -> None:
    """What open tasks may cost is planned even beyond the cap; new requests get the rest of it, in plan and summary."""
    workspace.write_job(job)
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        workspace.submit_without_collecting(api)
        api.advance(61)
    workspace.write_job(job, limits=f"{{max_credits: {cap}, requests_per_second: 1000}}")
    workspace.write_leads(make_leads(4))
    with serve_api(tmp_path / "api.db", latency="fixed(0)") as api:
        planned = run_plan_command(workspace, api, "--json").json_output["cost"]
        summary = workspace.run_job(api)
    new = min(3 * MAX_PRICE, max(0, cap - MAX_PRICE))
    assert planned["max"] == pytest.approx(new)
    assert summary.planned is not None
    assert summary.planned["max"] == pytest.approx(MAX_PRICE + new)
    assert summary.credits_spent <= MAX_PRICE + new


# Output


def test_json_keys(api: SandboxApi, workspace: Workspace) -> None:
    """`--json` has the counts, cost, balance, what the cap allows, and the time in seconds at the configured rate."""
    workspace.write_job(limits="{requests_per_second: 10, max_credits: 8}")
    workspace.write_leads(make_leads(4))

    output = run_plan_command(workspace, api, "--json").json_output

    assert (output["rows"], output["requests"], output["to_submit"], output["exit_code"]) == (4, 4, 4, 0)
    assert output["cost"] == {"min": 0.0, "likely": None, "max": 8}  # the cap, less than 4 * MAX_PRICE
    assert (output["balance"], output["max_credits"], output["cap_allows"]) == (10_000, 8, 2)
    assert output["seconds"] == 1.0  # four requests and six polls, at ten a second


def test_likely_cost_from_history(api: SandboxApi, workspace: Workspace) -> None:
    """The likely cost is the ledger's average credits per request times the requests to send."""
    workspace.write_leads(make_leads(12))
    summary = workspace.run_job(api)
    workspace.write_leads(make_leads(20))

    made_plan = plan_in_process(workspace, api)

    assert made_plan.to_submit == 8
    assert made_plan.cost.likely == pytest.approx(summary.credits_spent / 12 * 8, abs=1e-5)


def test_unknown_price(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an unknown price, cost and cap are null and shown as unknown; with a cap, plan and run refuse."""
    workspace.write_leads(make_leads(2))
    monkeypatch.setattr("enrich.databar.description.Waterfall.highest_price", lambda *_: None)

    output = run_plan_command(workspace, api, "--json").json_output

    assert (output["to_submit"], output["cost"]["max"], output["cap_allows"], output["worst_price"]) == (
        2,
        None,
        None,
        None,
    )
    assert "at an unknown price" in run_plan_command(workspace, api).stdout
    assert run_plan_command(workspace, api, "--max-credits", "5").exit_code == CommandRefused.exit_code


@pytest.mark.long
def test_plan_without_dedupe(api: SandboxApi, workspace: Workspace) -> None:
    """With `dedupe: false` equal rows are paid separately, and each has its own decision."""
    workspace.write_job(dedupe="false")
    workspace.write_leads(make_leads(2) * 3)
    workspace.run_job(api, RunOptions(limit=3))

    made_plan, kept = make_plan(
        load_job(workspace.job_file), api.access, RunOptions(limit=2), workspace.folder / "rows.csv"
    )
    assert isinstance(made_plan, Plan)
    summary = workspace.run_job(api, RunOptions(plan=kept))

    assert (made_plan.requests, made_plan.to_submit, summary.submitted) == (6, 2, 2)
    rows = [row["plan_decision"] for row in read_decisions(workspace.folder / "rows.csv")]
    assert rows[3:] == ["new", "new", "over_limit"]
    assert set(rows[:3]) <= {"found", "not_found"}


def test_plan_leaves_no_files(api: SandboxApi, workspace: Workspace) -> None:
    """A plan sends no POST and creates no ledger, lock or output."""
    workspace.write_leads(make_leads(3))

    result = run_plan_command(workspace, api)

    assert result.exit_code == 0
    assert "3 requests to send" in result.stdout
    assert sorted(path.name for path in workspace.folder.iterdir()) == ["job.yaml", "leads.csv"]
    assert api.audit()["accepted"] == 0


def test_plan_does_not_change_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """A plan leaves every byte of the ledger as it was."""
    workspace.write_leads(make_leads(3))
    workspace.run_job(api, RunOptions(limit=1))
    before = workspace.ledger_path.read_bytes()

    run_plan_command(workspace, api, "--rows", "rows.csv", "-o", "night.plan")

    assert workspace.ledger_path.read_bytes() == before


@BOTH_BACKENDS
def test_plan_during_run(api: SandboxApi, workspace: Workspace) -> None:
    """During a run a plan warns that it may be outdated, and it can't be saved."""
    workspace.write_leads(make_leads(3))
    workspace.run_job(api, RunOptions(limit=1))
    with lock_ledger(workspace.ledger_location, 0):
        result = run_plan_command(workspace, api)
        saved = run_plan_command(workspace, api, "-o", "night.plan")

    assert (
        result.exit_code,
        "a run of this ledger is in progress" in result.stdout,
        "2 requests" in result.stdout,
    ) == (
        0,
        True,
        True,
    )
    assert saved.exit_code == LedgerLocked.exit_code
    assert not (workspace.folder / "night.plan").exists()


def test_older_ledger_is_not_migrated(api: SandboxApi, workspace: Workspace) -> None:
    """A plan does not migrate an older ledger; the hint names a command that does, without sending requests."""
    workspace.write_leads(make_leads(1))
    workspace.run_job(api)
    alter_ledger(workspace, "PRAGMA user_version = 0")

    result = run_plan_command(workspace, api)

    assert result.exit_code == CommandRefused.exit_code
    assert "older version" in result.stderr
    assert "--limit 0" in result.stderr


def test_low_balance_is_reported(tmp_path: Path, workspace: Workspace) -> None:
    """With a low balance the plan is shown with the message that a run would give."""
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", balance=2.0) as api:
        result = run_plan_command(workspace, api)
    assert result.exit_code == 0
    assert "a run would be refused: the balance is 2 credits" in result.stdout
    assert "Next: " not in result.stdout


def test_high_numbers_are_written_out(tmp_path: Path, workspace: Workspace) -> None:
    """High prices, and the options of the next command, have all their digits."""
    workspace.write_job(enrichments="[833]")
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", balance=2.0) as api:
        api.set_prices({833: 1e9})
        refused = run_plan_command(workspace, api)
        api.top_up(1e9)
        result = run_plan_command(workspace, api, "--limit", "1234567", "--max-credits", "7654321.5")
    assert "one request may cost 1,000,000,000" in refused.stdout
    assert "--limit 1234567 --max-credits 7654321.5" in result.stdout
    assert "e+09" not in refused.stdout + result.stdout


# Saved plans


def save_plan(workspace: Workspace, api: SandboxApi, *arguments: str) -> str:
    """Save a plan; return its file name."""
    result = run_plan_command(workspace, api, "-o", "night.plan", *arguments)
    assert result.exit_code == 0, result.stderr
    return "night.plan"


@BOTH_BACKENDS
@pytest.mark.long
def test_saved_plan_runs_once(api: SandboxApi, workspace: Workspace) -> None:
    """A saved plan is used up by its run, and its file is readable for its owner only."""
    workspace.write_leads(make_leads(9))
    name = save_plan(workspace, api, "--limit", "4")

    runs = [
        workspace.run_in_process("run", "job.yaml", "--plan", name, "--json", api=api).json_output for _ in range(2)
    ]

    assert [(run["exit_code"], run["submitted"], run["pending"]) for run in runs] == [(0, 4, 5), (0, 0, 5)]
    assert (workspace.folder / name).stat().st_mode & 0o777 == 0o600


CHANGES: dict[str, Any] = {
    "the input": lambda workspace: workspace.write_leads(make_leads(8)),
    "the job file or the options": lambda workspace: workspace.write_job(suppress="never.txt", where="Note <> 'x'"),
    "the providers": lambda workspace: alter_ledger(workspace, "UPDATE targets SET providers = '[833]'"),
    "the list of `suppress`": lambda workspace: (workspace.folder / "never.txt").write_text("other.example\n"),
}


@pytest.mark.long
@pytest.mark.parametrize("what", list(CHANGES))
def test_saved_plan_refused_after_changes(api: SandboxApi, workspace: Workspace, what: str) -> None:
    """A change of the input, job, providers or suppression list is named with exit 5, and nothing is sent."""
    workspace.write_job(suppress="never.txt")
    (workspace.folder / "never.txt").write_text("gone.example\n")
    workspace.write_leads(make_leads(9))
    workspace.run_job(api, RunOptions(limit=0))
    name = save_plan(workspace, api)
    CHANGES[what](workspace)

    result = workspace.run_in_process("run", "job.yaml", "--plan", name, api=api)

    assert result.exit_code == CommandRefused.exit_code
    assert f"{what} changed since the plan was made" in result.stderr
    assert api.audit()["accepted"] == 0


@BOTH_BACKENDS
def test_saved_plan_refused_after_price_change(api: SandboxApi, workspace: Workspace) -> None:
    """After a change of prices the plan is refused."""
    workspace.write_leads(make_leads(2))
    made_plan = saved_plan(workspace, api)
    (target,) = made_plan.ground.targets
    first, *others = target.providers
    dearer = replace(target, providers=[replace(first, price=1), *others])
    ground = replace(made_plan.ground, targets=[dearer])

    summary = workspace.run_job(api, RunOptions(plan=replace(made_plan, ground=ground)))

    assert (summary.exit_code, summary.submitted) == (5, 0)
    assert str(summary.error).startswith("the prices changed")


@BOTH_BACKENDS
@pytest.mark.long
def test_killed_plan_keeps_its_budget(tmp_path: Path, workspace: Workspace) -> None:
    """After a kill, the second run sends only the rest of the plan: open tasks of the first one count once."""
    workspace.write_leads(make_leads(6))
    with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
        made_plan = saved_plan(workspace, api)
        first = workspace.run_job(api, RunOptions(limit=3, max_time_s=2.0))
        api.advance(90)
    with serve_api(tmp_path / "api.db", latency="fixed(0)") as api:
        summary = workspace.run_job(api, RunOptions(plan=made_plan))
        assert (summary.exit_code, summary.submitted, summary.pending) == (0, 6 - first.submitted, 0)
        assert (api.audit()["accepted"], api.audit()["paid_twice"]) == (6, 0)
    ((price,),) = workspace.sql("SELECT DISTINCT reserved FROM attempts")
    assert workspace.sql("SELECT cap FROM executions WHERE id = ?", summary.execution) == [(6 * price,)]


def test_saved_plan_cap(api: SandboxApi, workspace: Workspace) -> None:
    """A saved `--max-credits` holds for the run, whatever the job's cap is."""
    workspace.write_job(limits="{requests_per_second: 1000, max_credits: 500}")
    workspace.write_leads(make_leads(6))
    name = save_plan(workspace, api, "--max-credits", "3")

    result = workspace.run_in_process("run", "job.yaml", "--plan", name, "--json", api=api)

    assert (result.exit_code, result.json_output["submitted"]) == (12, 0)


@pytest.mark.long
@pytest.mark.parametrize("option", [("--limit", "1"), ("--sample", "2"), ("--max-credits", "1"), ("--retry", "failed")])
def test_saved_plan_rejects_selection_options(api: SandboxApi, workspace: Workspace, option: tuple[str, str]) -> None:
    """Options that would change the selection are refused."""
    workspace.write_leads(make_leads(2))
    result = workspace.run_in_process("run", "job.yaml", "--plan", save_plan(workspace, api), *option, api=api)
    assert (result.exit_code, "--plan cannot be combined with" in result.stderr) == (2, True)


@pytest.mark.parametrize("content", ["", "{}", '{"version": 2}', "First Name\nÅ\n"])
def test_invalid_plan_file(api: SandboxApi, workspace: Workspace, content: str) -> None:
    """The error for an invalid plan file names it, without a traceback."""
    workspace.write_leads(make_leads(1))
    (workspace.folder / "night.plan").write_text(content)

    result = workspace.run_in_process("run", "job.yaml", "--plan", "night.plan", api=api)

    assert (result.exit_code, "not a plan of this version" in result.stderr) == (JobError.exit_code, True)


@pytest.mark.long
def test_plan_output_never_replaces_other_files(api: SandboxApi, workspace: Workspace) -> None:
    """`-o` with the name of the input, the job or the ledger is refused."""
    workspace.write_leads(make_leads(2))
    workspace.run_job(api)
    for path in (workspace.job_file, workspace.folder / "leads.csv", workspace.ledger_path):
        before = path.read_bytes()
        result = run_plan_command(workspace, api, "-o", str(path))
        assert (result.exit_code, "the plan would replace" in result.stderr) == (2, True), result.stderr
        assert path.read_bytes() == before
    save_plan(workspace, api)
    save_plan(workspace, api)


def test_plan_file_roundtrip(api: SandboxApi, workspace: Workspace) -> None:
    """A plan survives writing and reading. Its folder is made, as that of an output is."""
    workspace.write_leads(make_leads(2))
    made_plan = saved_plan(workspace, api, RunOptions(sample=1, seed=7, retry=frozenset({State.FAILED})))
    path = workspace.folder / "plans" / "night.plan"

    write_plan(path, made_plan)

    assert read_plan(path) == made_plan
    assert "First0" not in path.read_text()
    assert json.loads(path.read_text())["version"] == 1
    with pytest.raises(EnrichError, match="is not a folder"):
        write_plan(path / "night.plan", made_plan)


def test_special_files_are_not_replaced(workspace: Workspace, api: SandboxApi) -> None:
    """A device or a pipe given as the output is not replaced."""
    workspace.write_leads(make_leads(1))
    os.mkfifo(workspace.folder / "pipe.csv")
    for words in (("-o", "pipe.csv"), ("--rows", "pipe.csv")):
        result = run_plan_command(workspace, api, *words)
        assert (result.exit_code, "it is not a file" in result.stderr) == (5, True)
    assert (workspace.folder / "pipe.csv").is_fifo()
