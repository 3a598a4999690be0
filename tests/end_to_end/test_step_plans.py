"""Plans of jobs with steps: exact for the first step, a ceiling for the others, and saved ones that a run follows."""

from __future__ import annotations

import csv
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.commands import plan as plan_command
from enrich.exit_codes import ExitCode
from enrich.job.job import load_job
from enrich.ledger.database import ledger_exists
from enrich.models import State
from enrich.run.context import RunOptions
from enrich.run.plan_file import SavedPlan, read_plan, write_plan
from enrich.run.step_plan import StepsPlan
from tests.end_to_end.test_steps import HEADER, JOB, SHORT_JOB, STEPS, make_people
from tests.support.cases import examples, first_quick
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, serve_api

#: Decisions with which a row is sent in a step, or may be.
MAY_BE_SENT = {"new", "retry", "refresh", "possible", "duplicate", "over_limit"}


#: A condition that reads an earlier step, and does not hold for an engineer, whatever that step finds.
NEVER_FOR_ENGINEERS = "Title <> 'Engineer' AND TRY_CAST(staff AS INT) > 50"


@pytest.fixture
def people(workspace: Workspace) -> Workspace:
    """Return a workspace with the short job and twelve leads of four companies."""
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(12, 4), HEADER)
    return workspace


def save_plan(workspace: Workspace, api: SandboxApi, *arguments: str) -> dict[str, Any]:
    """Save a plan in `night.plan`, and return its JSON object."""
    result = workspace.run_in_process("plan", "job.yaml", "-o", "night.plan", "--json", *arguments, api=api)
    assert result.exit_code == 0, result.stderr
    return result.json_output


def follow_plan(workspace: Workspace, api: SandboxApi) -> dict[str, Any]:
    """Run the job by the saved plan, and return its JSON object."""
    return workspace.run_in_process("run", "job.yaml", "--plan", "night.plan", "--json", api=api).json_output


def submitted_by_step(summary: dict[str, Any]) -> list[int]:
    """Return how many requests each step has sent."""
    return [step["submitted"] for step in summary["steps"]]


@BOTH_BACKENDS
@pytest.mark.parametrize(
    "arguments", first_quick(1, [("--limit", "4"), (), ("--sample", "5", "--seed", "3")], single=True), ids=str
)
def test_saved_plan_fixes_the_first_step(people: Workspace, api: SandboxApi, arguments: tuple[str, ...]) -> None:
    """The run sends what the plan says in the first step, at most what it says in the others, and nothing again."""
    plan = save_plan(people, api, *arguments)
    summary = follow_plan(people, api)
    first, second = submitted_by_step(summary)
    assert first == plan["steps"][0]["to_submit"] == int((arguments or (0, 12))[1])
    assert 0 < second <= plan["steps"][1]["at_most"]
    assert summary["credits_spent"] <= plan["cost"]["max"]
    again = follow_plan(people, api)
    assert (again["submitted"], again["exit_code"]) == (0, ExitCode.OK)
    # Leads that came later are not those of the plan.
    assert people.run_job(api).submitted > 0 or not arguments


def test_plan_is_a_ceiling_for_later_steps(people: Workspace, tmp_path: Path) -> None:
    """A later step sends at most what the plan foresees, and says what it leaves to the next run."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        save_plan(people, api)
        path = people.folder / "night.plan"
        plan = read_plan(path)
        assert plan.requests == [12, 12]
        write_plan(path, replace(plan, requests=[12, 5]))
        for expected in ([12, 5], [0, 0]):
            summary = follow_plan(people, api)
            assert (submitted_by_step(summary), summary["pending"]) == (expected, 7)
            assert any(note.startswith("person: 7 requests over the plan") for note in summary["notes"])
        assert summary["exit_code"] == ExitCode.OK
        assert people.run_job(api).submitted == 7


def test_fallback_behind_a_step_that_waits(people: Workspace, api: SandboxApi) -> None:
    """A fallback may be sent for a row that an open step can't let through: the plan counts it, and a run follows."""
    people.write_job(JOB.replace("TRY_CAST(staff AS INT) > 50", NEVER_FOR_ENGINEERS))
    people.write_leads([[*lead[:4], "Engineer", lead[5]] for lead in make_people(12, 4)], HEADER)
    plan = save_plan(people, api, "--rows", "rows.csv")
    assert [step["at_most"] for step in plan["steps"]] == [4, 0, 12, 12, 0]
    with (people.folder / "rows.csv").open(newline="", encoding="utf-8") as file:
        assert {row["plan_again_decision"] for row in csv.DictReader(file)} == {"possible"}
    summary = follow_plan(people, api)
    assert submitted_by_step(summary)[:3] == [4, 0, 12]
    assert summary["credits_spent"] <= plan["cost"]["max"]


def test_changed_plan_is_refused(people: Workspace, api: SandboxApi) -> None:
    """A plan does not hold for another job, input or price, in any step."""
    save_plan(people, api)
    for job, leads, price in (
        (SHORT_JOB + "complete: [work_email]\n", 12, None),
        (SHORT_JOB, 13, None),
        (SHORT_JOB, 12, 0.1),
    ):
        people.write_job(job)
        people.write_leads(make_people(leads, 4), HEADER)
        if price is not None:
            api.set_prices(dict.fromkeys(range(1000), price))
        summary = follow_plan(people, api)
        assert (summary["exit_code"], summary["submitted"]) == (ExitCode.REFUSED, 0)
        assert "changed since the plan was made" in summary["error"]


@BOTH_BACKENDS
@pytest.mark.long
def test_rows_of_a_plan(people: Workspace, tmp_path: Path) -> None:
    """Each row has a decision and a reason in every step, and the run sends nothing for the others."""
    people.write_job(JOB[: JOB.index("  - name: again")] + "limits: {requests_per_second: 1000}\n")
    leads = make_people(12, 4)
    leads[5][0] = ""
    people.write_leads(leads, HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=0.8) as api:
        people.run_in_process("run", "job.yaml", "--limit", "2", api=api)
        before = people.read_output()
        result = people.run_in_process("plan", "job.yaml", "--rows", "rows.csv", "--limit", "5", api=api)
        assert result.exit_code == 0, result.stderr
        rows = people.read_output("rows.csv")
        people.run_in_process("run", "job.yaml", "--limit", "5", api=api)
        after = people.read_output()
    steps = STEPS[:2]
    assert list(rows[0]) == [*HEADER, *(f"plan_{step}_{name}" for step in steps for name in ("decision", "why"))]
    assert {row["plan_company_decision"] for row in rows} <= {"found", "not_found", "new", "duplicate", "over_limit"}
    assert rows[5]["plan_email_decision"] in {"invalid", "filtered"}
    for row, old, new in zip(rows, before, after, strict=True):
        for step in steps:
            if new[f"enrich_{step}_task_id"] != old[f"enrich_{step}_task_id"]:
                assert row[f"plan_{step}_decision"] in MAY_BE_SENT
            assert row[f"plan_{step}_why"]
    assert any(row["plan_email_why"] == "sent if the results of company require it" for row in rows)


@BOTH_BACKENDS
@pytest.mark.long
def test_shared_request_takes_one_place_when_it_is_sent_again(people: Workspace, tmp_path: Path) -> None:
    """`--limit` counts a failed request that three leads share once, and so does the plan in a later step."""
    people.write_job(
        "version: 1\ninput: leads.csv\noutput: out.csv\nsteps:\n"
        "  - name: company\n    waterfall: company_lookup\n"
        "    params: {company_website: Website}\n    columns: {staff: employees}\n"
        "  - name: person\n    waterfall: person_by_link\n    where: enrich_company_status <> ''\n"
        "    params: {link: Website}\n    columns: {mail: work_email}\n"
        "limits: {requests_per_second: 1000}\n"
    )
    people.write_leads(make_people(12, 4), HEADER)
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        assert submitted_by_step(people.run_job(api).as_json()) == [4, 4]
        plan = save_plan(people, api, "--retry", "failed")
        assert [step["at_most"] for step in plan["steps"]] == [4, 4]
        summary = people.run_job(api, RunOptions(retry=frozenset({State.FAILED}), limit=3))
        assert submitted_by_step(summary.as_json()) == [3, 3]


# Any history

#: A step that all depend on, one with a condition, its fallback, and one that reads what either has found.
HISTORY_STEPS = STEPS[:4]
HISTORY_JOB = JOB[: JOB.index("  - name: phone")] + JOB[JOB.index("complete:") :]


@dataclass(frozen=True)
class Case:
    """Leads by number, what happened before, the options of the run, and changes of the job."""

    leads: list[int]
    history: list[tuple[str, int]]
    options: RunOptions
    job: dict[str, str]
    company_where: str
    email_where: str


CASES = st.builds(
    Case,
    leads=st.lists(st.integers(0, 11), min_size=1, max_size=14),
    history=st.lists(
        st.tuples(st.sampled_from(["limit", "sample", "doubt", "age", "no-credits"]), st.integers(1, 5)), max_size=3
    ),
    options=st.builds(
        dict,
        limit=st.one_of(st.none(), st.integers(0, 6)),
        sample=st.one_of(st.none(), st.integers(1, 6)),
        seed=st.integers(0, 3),
        retry=st.frozensets(st.sampled_from([State.FAILED, State.IN_DOUBT])),
    ).map(lambda chosen: RunOptions(**chosen)),
    job=st.fixed_dictionaries(
        {},
        optional={
            "caps": st.just("{by: Website, max: 2}"),
            "order_by": st.just("[Title, Website]"),
            "where": st.just("Title <> 'Engineer'"),
            "policy": st.just("{refresh: {found: 5d, not_found: 3d}}"),
            "dispatch": st.just("{bulk: 3}"),
        },
    ),
    company_where=st.sampled_from(["Title <> ''", "Title = 'Engineer'"]),
    email_where=st.sampled_from(
        ["Title <> ''", "TRY_CAST(staff AS INT) > 50", "Title = 'Engineer'", NEVER_FOR_ENGINEERS]
    ),
)
_case_numbers = itertools.count()


@pytest.fixture(scope="module")
def mixed_api() -> Iterator[SandboxApi]:
    """Serve an API that finds, misses and fails."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_api(Path(folder) / "api.db", failure_rate=0.2, free_failures=0.2, hit_rate=0.6) as api,
    ):
        yield api


@contextmanager
def make_history(api: SandboxApi, case: Case, number: int) -> Iterator[Workspace]:
    """Make a workspace with this history; `number` keeps the leads of different cases apart."""
    job = HISTORY_JOB.replace("TRY_CAST(staff AS INT) > 50", case.email_where)
    job = job.replace("    columns: {staff", f"    where: {case.company_where}\n    columns: {{staff")
    people = make_people(12, 4)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        workspace.write_leads([[f"P{number}x{n}", *make_unique(people[n], number)[1:]] for n in case.leads], HEADER)
        for what, count in case.history:
            workspace.write_job(job)
            if what in ("doubt", "no-credits"):
                api.inject_fault({"doubt": "error-after"}.get(what, what), count, "post")
                workspace.run_job(api, RunOptions(limit=count + 1))
                api.clear_faults()
            elif what in ("limit", "sample"):
                workspace.run_job(api, RunOptions(limit=count) if what == "limit" else RunOptions(sample=count))
            elif ledger_exists(workspace.ledger_location):
                workspace.sql("UPDATE attempts SET settled_ms = settled_ms - 345600000 WHERE id % 3 <> ?", count % 3)
        workspace.write_job(job, **case.job)
        yield workspace


def make_unique(person: list[str], number: int) -> list[str]:
    """Return a lead whose company and profile are those of one case."""
    return [each.replace("company", f"company{number}x").replace("/in/", f"/in/{number}x") for each in person]


def make_plan(workspace: Workspace, api: SandboxApi, options: RunOptions) -> tuple[StepsPlan, SavedPlan]:
    """Make a plan, with its rows."""
    job, rows = load_job(workspace.job_file), workspace.folder / "rows.csv"
    plan, kept = plan_command.make_plan(job, api.access, options, rows)
    assert isinstance(plan, StepsPlan)
    assert kept is not None
    return plan, kept


@pytest.mark.long
@settings(max_examples=examples(6), deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, stops=st.none() | st.lists(st.integers(0, 6), max_size=2))
def test_plan_holds_for_any_history(mixed_api: SandboxApi, case: Case, stops: list[int] | None) -> None:
    """The first step is exact, the others stay below their ceilings, and rows are sent as their decisions say.

    With `stops`, all runs of the saved plan together do so: the first ones end after so many POSTs, because the API has
    no credits, and the last one finds nothing to send in the first step. None: one run without the saved plan.
    """
    with make_history(mixed_api, case, next(_case_numbers)) as workspace:
        plan, kept = make_plan(workspace, mixed_api, case.options)
        rows = workspace.read_output("rows.csv")
        before = last_attempts(workspace)
        summaries = []
        for posts in [None] if stops is None else [*stops, None, None]:
            if posts is not None:
                mixed_api.inject_fault("slow", posts, "post", seconds=0.0)
                mixed_api.inject_fault("no-credits", 1, "post")
            options = case.options if stops is None else RunOptions(plan=kept)
            summaries.append(workspace.run_job(mixed_api, options).as_json())
            mixed_api.clear_faults()
        sent = [sum(counts) for counts in zip(*map(submitted_by_step, summaries), strict=True)]
        assert sent[0] - resent_for_free(workspace, STEPS[0], before) == plan.steps[0].to_submit
        for name, count, step in zip(HISTORY_STEPS, sent, plan.steps, strict=True):
            assert step.to_submit <= step.at_most
            assert count - resent_for_free(workspace, name, before) <= step.at_most
        assert plan.cost.maximum is not None
        assert sum(summary["credits_spent"] for summary in summaries) <= plan.cost.maximum + 1e-9
        executions = {summary["execution"] for summary in summaries}
        after = {attempt[0]: attempt[1:] for attempt in last_attempts(workspace)}
        for row, written in zip(rows, workspace.read_output(), strict=True):
            for name in HISTORY_STEPS:
                attempt = after.get(written[f"enrich_{name}_task_id"])
                if attempt is not None and attempt[0] == name and attempt[1] in executions:
                    assert row[f"plan_{name}_decision"] in MAY_BE_SENT
        assert stops is None or submitted_by_step(summaries[-1])[0] == 0


def last_attempts(workspace: Workspace) -> list[tuple[Any, ...]]:
    """Return task id, step, execution and request of every attempt that the API accepted."""
    if not ledger_exists(workspace.ledger_location):
        return []
    return [
        tuple(row)
        for row in workspace.sql(
            "SELECT task_id, step, execution_id, request_id FROM attempts WHERE task_id IS NOT NULL"
        )
    ]


def resent_for_free(workspace: Workspace, step: str, before: list[tuple[Any, ...]]) -> int:
    """Count the attempts of a step since then that repeat a request which has failed at no charge."""
    first_new = {attempt[0] for attempt in before}
    new = [attempt for attempt in last_attempts(workspace) if attempt[0] not in first_new and attempt[1] == step]
    return len(new) - len({attempt[3] for attempt in new})


def test_plan_file_has_no_leads(people: Workspace, api: SandboxApi) -> None:
    """The file of a plan has digests, prices and counts, and no cell."""
    save_plan(people, api)
    text = (people.folder / "night.plan").read_text(encoding="utf-8")
    assert "company" not in text
    assert [len(target["providers"]) > 0 for target in json.loads(text)["ground"]["targets"]] == [True] * 2


def test_price_that_depends_on_the_row(workspace: Workspace, api: SandboxApi) -> None:
    """A price that is multiplied with a cell is known for each row, and not called unknown."""
    step = "{name: people, enrichment: 60, params: {company_website: Website, limit: Title}, limits: {max_credits: 2}}"
    workspace.write_job(f"version: 1\ninput: leads.csv\noutput: out.csv\nsteps:\n  - {step}\n")
    workspace.write_leads([["", "", "a.example", "", "3", ""]], HEADER)
    lines = workspace.run_in_process("plan", "job.yaml", api=api).stdout.splitlines()
    assert [line.split()[4:] for line in lines if line.startswith("  people")] == [
        ["by", "row", "by", "row", "cap", "2"]
    ]


@pytest.mark.parametrize("cap_of", ["job", "step"])
def test_planned_cost_within_the_cap(workspace: Workspace, api: SandboxApi, cap_of: str) -> None:
    """Where the price depends on the row, plan and run summary name the cap as the highest cost, whichever it is."""
    cap = "limits: {max_credits: 2}"
    step = "{name: people, enrichment: 60, params: {company_website: Website, limit: Title}" + (
        f", {cap}}}" if cap_of == "step" else "}"
    )
    job = f"version: 1\ninput: leads.csv\noutput: out.csv\nsteps:\n  - {step}\n"
    workspace.write_job(job + (f"{cap}\n" if cap_of == "job" else ""))
    workspace.write_leads([["", "", "a.example", "", "3", ""]], HEADER)
    plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    planned = workspace.run_job(api).planned
    assert planned is not None
    assert plan["cost"]["max"] == planned["max"] == 2
