"""Comparing two jobs or executions: matches and costs on the leads that both sides requested."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.job.job import load_job
from enrich.report.compare import compare_executions, compare_jobs, mcnemar_p_value, write_verdict
from enrich.report.data import ComparedSide, Comparison
from tests.support.cases import in_turn
from tests.support.workspace import INSTANT_API, SandboxApi, Workspace, make_leads, serve_api


def write_other_job(workspace: Workspace, name: str = "other", **changes: str) -> Path:
    """Write another job beside the workspace's."""
    changes = {"output": f"{name}.csv", "name": name} | changes
    ours = workspace.job_file.read_text()
    path = workspace.write_job(**changes).rename(workspace.folder / f"{name}.yaml")
    workspace.job_file.write_text(ours)
    return path


def run_job(workspace: Workspace, api: SandboxApi, job: str = "job.yaml") -> dict[str, Any]:
    """Run a job; return its summary."""
    result = workspace.run_in_process("run", job, "--json", api=api)
    assert result.exit_code == 0, result.stderr
    return result.json_output


def compare_json(workspace: Workspace, what: str, *more: str) -> dict[str, Any]:
    """Return the comparison that `--json` prints."""
    result = workspace.run_in_process("report", "job.yaml", "--json", "--compare", what, *more)
    assert (result.exit_code, result.stderr) == (0, "")
    output: dict[str, Any] = result.json_output["comparison"]
    return output


def comparison_error(workspace: Workspace, what: str) -> tuple[int, str]:
    """Return the error of a refused comparison."""
    result = workspace.run_in_process("report", "job.yaml", "--json", "--compare", what)
    return result.exit_code, result.stderr


@pytest.mark.long
def test_two_ledgers(tmp_path: Path, workspace: Workspace) -> None:
    """With two ledgers, each side has its own numbers, and common leads are compared."""
    workspace.write_job(enrichments="[833, 966]")
    workspace.write_leads(make_leads(60))
    workspace.write_leads(make_leads(60, start=20), name="later.csv")
    write_other_job(workspace, input="later.csv", enrichments="[701]")
    with serve_api(tmp_path / "api.db", replace(INSTANT_API, charge_misses=True)) as api:
        summaries = [run_job(workspace, api), run_job(workspace, api, "other.yaml")]
        bought = api.audit()["runs"]
    comparison = compare_json(workspace, "other.yaml")

    for side, summary, label in zip(
        (comparison["left"], comparison["right"]), summaries, ("job.yaml", "other.yaml"), strict=True
    ):
        assert side["label"] == label
        assert (side["asked"], side["found"], side["not_found"]) == (60, summary["found"], summary["not_found"])
        assert side["credits"] == pytest.approx(summary["credits_spent"])
        assert side["cost_per_hit"] == pytest.approx(summary["credits_spent"] / summary["found"])
    assert comparison["left"]["providers"] == ["Mailhound", "Peoplegrid"]
    assert comparison["right"]["providers"] == ["Inboxly"]
    left, right = matches_by_lead(workspace, "out.csv"), matches_by_lead(workspace, "other.csv")
    both = left.keys() & right.keys()
    assert comparison["common"] == len(both) == 40
    assert comparison["both"] == sum(left[lead] and right[lead] for lead in both)
    assert comparison["only_left"] == sum(left[lead] and not right[lead] for lead in both)
    assert comparison["only_right"] == sum(right[lead] and not left[lead] for lead in both)
    assert comparison["neither"] == sum(not left[lead] and not right[lead] for lead in both)
    for name, providers in (("common_left_credits", [833, 966]), ("common_right_credits", [701])):
        spent = [each["credits"] for each in bought if each["enrichments"] == providers]
        common = [
            each["credits"]
            for each in bought
            if each["enrichments"] == providers and each["params"]["first_name"] in both
        ]
        assert len(spent) == 60
        assert comparison[name] == pytest.approx(sum(common))
    assert comparison["verdict"].startswith("`other.yaml` has ")
    assert "40 leads of both sides" in comparison["verdict"]


def matches_by_lead(workspace: Workspace, output: str) -> dict[str, bool]:
    """Return for each lead whether it was found."""
    return {row["First Name"]: row["enrich_status"] == "found" for row in workspace.read_output(output)}


@pytest.mark.long
def test_two_jobs_sharing_a_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """Another verifier makes another request; an identical request is sent once and counts for the first job."""
    workspace.write_job(ledger="shared.db")
    workspace.write_leads(make_leads(10))
    write_other_job(workspace, ledger="shared.db", email_verifier="10")
    write_other_job(workspace, "same", ledger="shared.db")
    for job in ("job.yaml", "other.yaml", "same.yaml"):
        run_job(workspace, api, job)

    comparison = compare_json(workspace, "other.yaml")
    assert (comparison["left"]["asked"], comparison["right"]["asked"], comparison["common"]) == (10, 10, 10)
    assert [each["name"] for each in comparison["right_providers"] if each["verifies"]] == ["Mailproof"]
    nothing = compare_json(workspace, "same.yaml")
    assert (nothing["right"]["asked"], nothing["right"]["cost_per_hit"], nothing["common"]) == (0, None, 0)
    assert nothing["verdict"].startswith("No lead has results on both sides.")


@pytest.mark.long
def test_two_executions_of_a_job(tmp_path: Path, workspace: Workspace) -> None:
    """The newest execution with answers is compared with an earlier one; a lead requested in both is common."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db") as api:
        first = run_job(workspace, api)
        api.set_prices({833: 2, 966: 2, 701: 2, 745: 2})
        workspace.write_leads(make_leads(15))
        workspace.write_job(policy="{refresh: {found: 0s, not_found: 0s}}")
        second = run_job(workspace, api)
        assert workspace.run_in_process("run", "job.yaml", "--limit", "0", api=api).exit_code == 0  # no answers
    comparison = compare_json(workspace, "1")

    assert [comparison[side]["label"] for side in ("left", "right")] == ["run 2", "run 1"]
    assert (comparison["left"]["asked"], comparison["right"]["asked"], comparison["common"]) == (15, 12, 12)
    assert comparison["left"]["credits"] == pytest.approx(second["credits_spent"])
    assert comparison["common_right_credits"] == pytest.approx(first["credits_spent"])
    assert comparison["common_left_credits"] > comparison["common_right_credits"]
    assert (comparison["both"], comparison["neither"]) == (first["found"], first["not_found"])
    assert "credits less per match" in comparison["verdict"]
    assert compare_executions(load_job(workspace.job_file), 2).left.label == "run 1"


@pytest.mark.long
def test_bulk_cost_is_split_by_lead(api: SandboxApi, workspace: Workspace) -> None:
    """A bulk task's price is split by lead, so each lead takes its part to the side it is on."""
    workspace.write_leads(make_leads(8))
    write_other_job(workspace, input="few.csv", dispatch="{bulk: 5}", columns="{mail: email}")
    workspace.write_leads(make_leads(5), name="few.csv")
    run_job(workspace, api)
    summary = run_job(workspace, api, "other.yaml")

    comparison = compare_jobs(load_job(workspace.job_file), load_job(workspace.folder / "other.yaml"))
    assert comparison.common == 5
    assert comparison.common_right_credits == pytest.approx(summary["credits_spent"])
    assert comparison.only_left == comparison.only_right == 0
    assert "as many matches for the 5 leads" in comparison.verdict


@pytest.mark.long
def test_forgotten_leads_are_excluded(api: SandboxApi, workspace: Workspace) -> None:
    """Forgotten leads are not common leads, because their identity is erased."""
    workspace.write_leads(make_leads(6))
    write_other_job(workspace)
    run_job(workspace, api)
    run_job(workspace, api, "other.yaml")
    for job in ("job.yaml", "other.yaml"):
        assert workspace.run_in_process("forget", job, "--match", "First Name=First1", "--yes").exit_code == 0
        assert workspace.run_in_process("forget", job, "--match", "First Name=First2", "--yes").exit_code == 0

    comparison = compare_json(workspace, "other.yaml")
    assert (comparison["left"]["asked"], comparison["common"]) == (6, 4)


def test_invalid_comparisons(api: SandboxApi, workspace: Workspace) -> None:
    """A job compared with itself, an unknown execution, a job that never ran or is missing is refused."""
    workspace.write_leads(make_leads(2))
    write_other_job(workspace)
    assert comparison_error(workspace, "1")[0] == 5
    run_job(workspace, api)

    assert comparison_error(workspace, "1") == (
        5,
        "error: --compare 1: no other run of job has results\nhint: compare it after the next run\n",
    )
    code, message = comparison_error(workspace, "7")
    assert code == 2
    assert "job has no run 7" in message
    assert "`enrich runs job.yaml` lists the runs" in message
    for text in ("\N{ARABIC-INDIC DIGIT ONE}", "9" * 5000):  # not the number of a run
        assert comparison_error(workspace, text)[0] == 2
    assert comparison_error(workspace, "job.yaml")[0] == 2
    code, message = comparison_error(workspace, "other.yaml")
    assert code == 5
    assert "other has no runs yet" in message
    assert message.rstrip().endswith("other.yaml")
    code, message = comparison_error(workspace, "third.yaml")
    assert code == 2
    assert "third.yaml" in message


@pytest.mark.long
def test_comparison_has_no_personal_data(api: SandboxApi, workspace: Workspace) -> None:
    """A comparison has no personal data, because reports are passed on."""
    workspace.write_leads(make_leads(4))
    write_other_job(workspace)
    run_job(workspace, api)
    run_job(workspace, api, "other.yaml")
    message = json.dumps(compare_json(workspace, "other.yaml"))
    assert "First1" not in message
    assert "company1" not in message


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(one: int, other_: int) -> None:
    """The p-value equals the exact binomial test in integers."""
    both = one + other_
    tail = sum(Fraction(comb(both, chosen), 2**both) for chosen in range(min(one, other_) + 1))
    exact = 1.0 if one == other_ else float(min(Fraction(1), 2 * tail))
    assert mcnemar_p_value(one, other_) == pytest.approx(exact)
    assert mcnemar_p_value(one, other_) == mcnemar_p_value(other_, one)


def test_mcnemar_approximation_matches_exact() -> None:
    """Where the normal approximation begins the value does not jump, and millions of leads take no time."""
    exact, near = mcnemar_p_value(460, 540), mcnemar_p_value(460, 541)
    assert near == pytest.approx(exact, rel=0.15)
    assert mcnemar_p_value(1_000_000, 1_010_000) < 1e-6


def make_comparison(leads: tuple[int, int, int, int], left: float, right: float) -> Comparison:
    """Make a comparison of common leads: found by both, only left, only right, neither."""
    sides = [ComparedSide(label, (), 0, 0, 0, 0.0, None) for label in ("a.yaml", "b.yaml")]
    return Comparison(sides[0], sides[1], (), (), sum(leads), *leads, left, right, "")


@in_turn(
    ("comparison", "unknown", "verdict"),
    [
        (
            make_comparison((60, 29, 41, 20), 89 * 0.50, 101 * 0.39),
            0,
            (
                "`b.yaml` has 12 more matches for the 150 leads of both sides (41 only there, 29 only here: may be "
                "chance) at 0.11 credits less per match."
            ),
        ),
        (
            make_comparison((60, 40, 0, 0), 100, 90),
            0,
            (
                "`b.yaml` has 40 fewer matches for the 100 leads of both sides (0 only there, 40 only here: not "
                "chance, p < 0.001) at 0.50 credits more per match."
            ),
        ),
        (
            make_comparison((60, 5, 17, 0), 65, 77),
            0,
            (
                "`b.yaml` has 12 more matches for the 82 leads of both sides (17 only there, 5 only here: unlikely to "
                "be chance, p = 0.017) at the same cost per match."
            ),
        ),
        (
            make_comparison((1, 0, 0, 0), 1, 1),
            1,
            (
                "`b.yaml` has as many matches for the 1 lead of both sides (0 only there, 0 only here). The price of "
                "1 result is unknown."
            ),
        ),
        (
            make_comparison((0, 0, 0, 3), 1, 2.5),
            0,
            (
                "`b.yaml` has as many matches for the 3 leads of both sides (0 only there, 0 only here) "
                "at 1.50 credits more."
            ),
        ),
        (
            make_comparison((0, 0, 0, 0), 0, 0),
            0,
            "No lead has results on both sides. The sides have different leads, so their rates are hard to compare.",
        ),
    ],
)
def test_verdict_text(comparison: Comparison, unknown: int, verdict: str) -> None:
    """The verdict names the side that found more for less, and the certainty."""
    assert write_verdict(comparison, unknown) == verdict
