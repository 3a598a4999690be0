"""What a later step of a job must not spend: twice, beyond the balance, or against the user's word."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrich.errors import RunDeclined
from enrich.exit_codes import ExitCode, JobArguments, required_actions
from enrich.models import State
from enrich.run.context import RunOptions
from tests.end_to_end.test_steps import HEADER, SHORT_JOB, make_people, statuses_of
from tests.support.cases import first_quick
from tests.support.workspace import SandboxApi, Workspace, serve_api

EMAIL = SHORT_JOB[SHORT_JOB.index("    waterfall: email_getter") : SHORT_JOB.index("  - name: person")]
COMPANY = """\
  - name: company
    waterfall: company_lookup
    params: {company_website: Website}
    columns: {staff: employees}
"""
#: A company, then an e-mail whether or not the company was found, or only where it was asked for.
COMPANY_JOB = SHORT_JOB[: SHORT_JOB.index("  - name: email")] + COMPANY + "  - name: email\n" + EMAIL
DEPENDENT = "    where: enrich_company_status = 'found'\n"


@pytest.fixture
def paid_elsewhere(workspace: Workspace) -> Workspace:
    """Make a job without steps whose ledger has paid for the e-mails of ten leads."""
    workspace.write_leads(make_people(10), HEADER)
    single = EMAIL.replace("\n    ", "\n").replace("    waterfall", "waterfall")
    workspace.write_job("version: 1\nname: single\ninput: leads.csv\noutput: single.csv\n" + single)
    return workspace


def test_neighbour_has_paid_for_a_later_step(paid_elsewhere: Workspace, api: SandboxApi) -> None:
    """A new ledger is refused at the start for what a later step would pay again, though the first one is new."""
    paid_elsewhere.run_job(api)
    paid_elsewhere.write_job(COMPANY_JOB)
    plan = paid_elsewhere.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    assert "10 of the 20 requests are already paid for in single.db" in plan["notes"][-1]
    for limit in (None, 3):
        with pytest.raises(RunDeclined, match=r"10 of the 20 requests are already paid for in single\.db"):
            paid_elsewhere.run_job(api, RunOptions(limit=limit))
    assert api.audit()["accepted"] == 10
    assert paid_elsewhere.run_job(api, RunOptions(new_ledger=True)).submitted == 20


@pytest.mark.long
def test_neighbour_has_paid_for_a_dependent_step(paid_elsewhere: Workspace, tmp_path: Path) -> None:
    """What becomes known in the run is compared before the step sends: its rows stay pending, the output is written."""
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        paid_elsewhere.run_job(api)
        paid_elsewhere.write_job(COMPANY_JOB + DEPENDENT)
        summary = paid_elsewhere.run_job(api)
        rows = paid_elsewhere.read_output()
        assert summary.exit_code == ExitCode.CREDITS
        assert summary.error is not None
        assert summary.error.startswith("10 of the 10 requests are already paid for in single.db")
        assert summary.hint == "--new-ledger pays again for the step `email`"
        (action,) = required_actions(summary.exit_code, summary.as_json(), JobArguments("job.yaml", "job.yaml"))
        assert action.commands == ("enrich run job.yaml --new-ledger",)
        assert statuses_of(rows, "company") == {"found": 10}
        assert statuses_of(rows, "email") == statuses_of(rows) == {"pending": 10}
        with pytest.raises(RunDeclined, match="10 of the 10 requests"):
            paid_elsewhere.run_job(api)
        assert api.audit()["accepted"] == 20
        assert paid_elsewhere.run_job(api, RunOptions(new_ledger=True)).submitted == 10


def test_balance_too_low_for_a_later_step(workspace: Workspace, tmp_path: Path) -> None:
    """A step that the balance no longer affords leaves its rows pending, and the output is written."""
    workspace.write_job(COMPANY_JOB)
    workspace.write_leads(make_people(4), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0, balance=4.0) as api:
        summary = workspace.run_job(api)
        rows = workspace.read_output()
        assert summary.exit_code == ExitCode.CREDITS
        assert "one request may cost 3.51" in str(summary.error)
        assert statuses_of(rows, "company") == {"found": 4}
        assert statuses_of(rows, "email") == {"pending": 4}
        api.top_up(100)
        assert workspace.run_job(api).exit_code == ExitCode.OK


@pytest.mark.long
def test_shared_question_is_retried_once(workspace: Workspace, tmp_path: Path) -> None:
    """`--retry` pays a question that two steps ask once, though it fails again."""
    workspace.write_job(SHORT_JOB[: SHORT_JOB.index("  - name: person")] + "  - name: again\n" + EMAIL)
    workspace.write_leads(make_people(5), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=0.0) as api:
        assert workspace.run_job(api).submitted == 5
        assert workspace.run_job(api, RunOptions(retry=frozenset({State.NOT_FOUND}))).submitted == 5


def test_plan_counts_a_shared_question_once(workspace: Workspace, tmp_path: Path) -> None:
    """A question that two steps ask is planned where it is sent: at the first; `requests` are those of the run."""
    again = "  - name: again\n" + EMAIL
    workspace.write_job(SHORT_JOB.replace("  - name: person", again + "  - name: person"))
    workspace.write_leads(make_people(5), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert plan["to_submit"] == 5
        assert [step["at_most"] for step in plan["steps"]] == [5, 0, 5]
        assert plan["requests"] == 15
        assert [step["submitted"] for step in workspace.run_job(api).steps] == [5, 0, 5]
        after = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        assert (after["to_submit"], after["requests"]) == (0, workspace.run_job(api).requests)


def test_plan_counts_a_shared_question_beyond_the_cap_of_a_step(workspace: Workspace, api: SandboxApi) -> None:
    """Where the first step has a cap of its own, the second one may have to send the question."""
    workspace.write_job(
        SHORT_JOB[: SHORT_JOB.index("  - name: person")]
        + "    limits: {max_credits: 7.1}\n  - name: again\n"
        + EMAIL
        + "limits: {requests_per_second: 1000}\n"
    )
    workspace.write_leads(make_people(5), HEADER)
    plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    summary = workspace.run_job(api)
    assert summary.credits_spent <= plan["cost"]["max"]
    assert all(done["submitted"] <= step["at_most"] for done, step in zip(summary.steps, plan["steps"], strict=True))


@pytest.mark.parametrize("cap", [1, 4])
def test_cap_of_a_step_that_its_canary_does_not_fit_in(workspace: Workspace, tmp_path: Path, cap: float) -> None:
    """A canary that the step's cap cuts short gives no verdict: the step ends, and independent ones continue."""
    limits = f"    canary: {{rows: 3, min_hit_rate: 1.0}}\n    limits: {{max_credits: {cap}}}\n"
    company = "  - name: company\n    waterfall: company_lookup\n    params: {company_website: Website}\n"
    workspace.write_job(SHORT_JOB.replace("  - name: person\n", limits + company + "  - name: person\n"))
    workspace.write_leads(make_people(5), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=0.0, miss_kinds=("null",), charge_misses=True) as api:
        summary = workspace.run_job(api)
    assert (summary.exit_code, summary.steps[0]["submitted"], summary.steps[1]["submitted"]) == (
        ExitCode.CREDITS,
        int(cap > 3.51),
        5,
    )
    reached = "the credits cap of the step `email` is reached"
    assert summary.error == (
        reached if cap > 3.51 else f"`max_credits` of the step `email` is {cap}, and one request may cost 3.51"
    )


def test_tasks_of_an_earlier_run_count_for_the_cap_of_their_step(workspace: Workspace, tmp_path: Path) -> None:
    """What a run collects of a step and what it sends there are within the step's cap, as within that of the job."""
    one_provider = SHORT_JOB.replace("waterfall: email_getter", "waterfall: email_getter\n    enrichments: [833]")
    cap = "    limits: {max_credits: 0.5}\n  - name: person"
    with serve_api(tmp_path / "api.db", hit_rate=1.0, latency="fixed(3600)") as api:
        api.set_prices({833: 0.1})
        workspace.write_job(one_provider)
        workspace.write_leads(make_people(4), HEADER)
        workspace.submit_without_collecting(api)
    port = int(api.base_url.rpartition(":")[2].removesuffix("/v1"))
    with serve_api(tmp_path / "api.db", port=port, hit_rate=1.0) as api:
        api.advance(3600)
        workspace.write_leads(make_people(9), HEADER)
        workspace.write_job(one_provider.replace("  - name: person", cap))
        summary = workspace.run_job(api)
    assert (summary.exit_code, summary.steps[0]["submitted"]) == (ExitCode.CREDITS, 1)
    assert summary.steps[0]["credits_spent"] == pytest.approx(0.5)


@pytest.mark.parametrize("step", [True, False])
def test_prices_above_the_reserved_ones_count_for_a_cap(workspace: Workspace, tmp_path: Path, *, step: bool) -> None:
    """A cap, of a step as of the job, ends the claims once the answers have cost it, whatever was reserved for them."""
    caps = "    limits: {max_credits: 10}\nlimits: {in_flight: 2}\n"
    if not step:
        caps = "limits: {max_credits: 10, in_flight: 2}\n"
    job = SHORT_JOB[: SHORT_JOB.index("  - name: person")] + "    enrichments: [833]\n" + caps
    workspace.write_job(job)
    workspace.write_leads(make_people(20), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        api.set_prices({833: 0.5})
        api.inject_fault("odd-credits", 99, "get", credits=3)
        summary = workspace.run_job(api)
    assert (summary.exit_code, summary.submitted in {4, 5}) == (ExitCode.CREDITS, True), summary.submitted
    assert summary.credits_spent == 3 * summary.submitted


def test_failures_of_found_leads_are_named(workspace: Workspace, tmp_path: Path) -> None:
    """A step that failed for leads that are found is in the summary, with the command that sends it again."""
    workspace.write_job(SHORT_JOB + "complete: [work_email]\n")
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0, failure_rate=0.0) as api:
        workspace.write_job(SHORT_JOB[: SHORT_JOB.index("  - name: person")] + "limits: {requests_per_second: 1000}\n")
        workspace.run_job(api)
    with serve_api(tmp_path / "api.db", hit_rate=1.0, failure_rate=1.0, free_failures=0.0) as api:
        workspace.write_job(SHORT_JOB + "complete: [work_email]\n")
        result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    summary = result.json_output
    assert (summary["exit_code"], summary["found"], summary["failed"]) == (ExitCode.SOME_FAILED, 3, 0)
    assert "  person: 3 failed\n" in result.stderr
    retry = "Retry 3 failed results (may charge)"
    assert f"{retry}: enrich run job.yaml --retry failed" in result.stderr
    needs = workspace.run_in_process("report", "job.yaml", "--json").json_output["needs"]
    assert [need["text"] for need in needs] == [retry]


@pytest.mark.long
def test_doubt_about_a_refresh_in_an_earlier_step(workspace: Workspace, tmp_path: Path) -> None:
    """A request in doubt is exit 14 in whichever step it is, though its row shows an older answer."""
    workspace.write_job(
        SHORT_JOB.replace("work_email: email}", "work_email: email}\n    policy: {refresh: {found: 1s}}")
    )
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        workspace.sql("UPDATE attempts SET settled_ms = settled_ms - 10000")
        api.inject_fault("error-after", 1, "post")
        summary = workspace.run_job(api)
    assert statuses_of(workspace.read_output()) == {"found": 3}
    assert summary.exit_code == ExitCode.IN_DOUBT


@pytest.mark.parametrize("again", first_quick(0, ["retry", "refresh"]))
def test_plan_counts_what_later_steps_ask_again(workspace: Workspace, tmp_path: Path, again: str) -> None:
    """`plan` counts the requests that a later step selects itself, also while an earlier step is asked again."""
    job = COMPANY_JOB + "    where: enrich_company_status <> ''\n"
    workspace.write_job(job + ("policy: {refresh: {not_found: 1s}}\n" if again == "refresh" else ""))
    workspace.write_leads(make_people(5), HEADER)
    retry, failures = ({State.FAILED}, 1.0) if again == "retry" else (set[State](), 0.0)
    with serve_api(tmp_path / "api.db", hit_rate=0.0, failure_rate=failures, free_failures=0.0) as api:
        assert workspace.run_job(api).submitted == 10
        workspace.sql("UPDATE attempts SET settled_ms = settled_ms - 10000")
        options = [option for state in retry for option in ("--retry", state.value)]
        plan = workspace.run_in_process("plan", "job.yaml", "--json", *options, api=api).json_output
        summary = workspace.run_job(api, RunOptions(retry=frozenset(retry)))
    assert [step["at_most"] for step in plan["steps"]] == [5, 5]
    assert [step["submitted"] for step in summary.steps] == [5, 5]
    assert summary.credits_spent <= plan["cost"]["max"]


@pytest.mark.long
def test_cost_of_a_lead_at_unknown_prices(workspace: Workspace, tmp_path: Path) -> None:
    """Where the price of an answer is unknown, so is the cost of a lead."""
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        assert workspace.run_job(api).cost_per_lead is not None
        workspace.sql("UPDATE executions SET unknown = 1")
        assert workspace.run_job(api).cost_per_lead is None


def test_cost_of_a_lead_with_bulk_tasks(workspace: Workspace, api: SandboxApi) -> None:
    """The price of a bulk task belongs to no row, so the cost of a lead is not known. It is not 0."""
    workspace.write_job(
        SHORT_JOB.replace("    columns: {work_email", "    dispatch: {bulk: 5}\n    columns: {work_email")
    )
    workspace.write_leads(make_people(9), HEADER)
    summary = workspace.run_job(api)
    assert (summary.found or 0) > 0 < summary.credits_spent
    assert summary.cost_per_lead is None
    assert workspace.run_in_process("collect", "job.yaml", "--json").json_output["cost_per_lead"] is None


@pytest.mark.parametrize(
    "options", first_quick(1, [RunOptions(retry=frozenset({State.IN_DOUBT})), RunOptions(accept_in_doubt=True)])
)
def test_doubts_of_the_same_run_are_left_to_the_user(workspace: Workspace, tmp_path: Path, options: RunOptions) -> None:
    """`--retry in_doubt` and `--accept in_doubt` concern what was unconfirmed before the run, in later steps too."""
    workspace.write_job(SHORT_JOB[: SHORT_JOB.index("  - name: person")] + "  - name: again\n" + EMAIL)
    workspace.write_leads(make_people(5), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        api.inject_fault("error-after", 2, "post")
        summary = workspace.run_job(api, options)
        assert (summary.exit_code, summary.in_doubt) == (ExitCode.IN_DOUBT, 2)
        assert api.audit()["accepted"] == 5


def test_limited_run_counts_and_accepts_what_has_a_result(workspace: Workspace, tmp_path: Path) -> None:
    """Also of leads over the limit, `--accept` holds for all unconfirmed requests, and results count as reused."""
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(5), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        api.inject_fault("error-after", 2, "post")
        workspace.run_job(api)
        workspace.write_leads(make_people(8), HEADER)
        summary = workspace.run_job(api, RunOptions(accept_in_doubt=True, limit=0))
        plan = workspace.run_in_process("plan", "job.yaml", "--limit", "0", "--json", api=api).json_output
    assert (summary.exit_code, summary.submitted) == (ExitCode.SOME_FAILED, 0)
    assert (summary.failed, summary.in_doubt, summary.pending) == (2, 0, 3)
    assert summary.requests == summary.reused == plan["requests"] == 8


@pytest.mark.long
def test_changed_target_of_a_step(workspace: Workspace, tmp_path: Path) -> None:
    """`plan` and the run say that a step pays again for leads when its target or its providers were changed."""
    workspace.write_job(SHORT_JOB)
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db", hit_rate=1.0) as api:
        workspace.run_job(api)
        workspace.write_job(
            SHORT_JOB.replace("waterfall: email_getter", "waterfall: email_getter\n    enrichments: [113]")
        )
        plan = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
        changed = workspace.run_job(api)
        unchanged = workspace.run_job(api)
    note = (
        "email: its target or its providers have changed: leads that it has enriched before are paid again, "
        "also by person where its results differ"
    )
    assert plan["notes"] == [note]
    assert (changed.steps[0]["submitted"], note in changed.notes) == (3, True)
    assert (unchanged.submitted, unchanged.notes) == (0, [])


def test_condition_that_fails_without_an_answer(workspace: Workspace, tmp_path: Path) -> None:
    """A condition that cannot be computed where an earlier step has found nothing is exit 2 before anything is sent."""
    condition = "params: {email: work_email}\n    where: CAST(work_email AS INT) > 5"
    workspace.write_job(SHORT_JOB.replace("params: {email: work_email}", condition))
    workspace.write_leads(make_people(3), HEADER)
    with serve_api(tmp_path / "api.db") as api:
        summary = workspace.run_job(api, RunOptions(new_ledger=True))
        assert (summary.exit_code, summary.submitted) == (ExitCode.USAGE, 0)
        assert "steps.1.where: cannot be computed" in str(summary.error)
        assert "TRY_CAST" in str(summary.hint)
        assert api.audit()["accepted"] == 0
