"""Side by side: who found more for less, told like with like."""

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

from enrich.job import load_job
from enrich.report.compare import compare_executions, compare_jobs, mcnemar, verdict
from enrich.report.facts import Comparison, Side
from tests.cases import in_turn
from tests.harness import CALM, Api, Office, people, serving


def other(office: Office, name: str = "other", **changes: str) -> Path:
    """Write another job beside the office's."""
    changes = {"output": f"{name}.csv", "name": name} | changes
    ours = office.job_file.read_text()
    path = office.write_job(**changes).rename(office.folder / f"{name}.yaml")
    office.job_file.write_text(ours)
    return path


def run(office: Office, api: Api, job: str = "job.yaml") -> dict[str, Any]:
    """Run a job; return its receipt."""
    done = office.command("run", job, "--json", api=api)
    assert done.code == 0, done.stderr
    return done.receipt


def compared(office: Office, what: str, *more: str) -> dict[str, Any]:
    """Return the comparison as `--json` prints it."""
    done = office.command("report", "job.yaml", "--json", "--compare", what, *more)
    assert (done.code, done.stderr) == (0, "")
    told: dict[str, Any] = done.receipt["comparison"]
    return told


def refused(office: Office, what: str) -> tuple[int, str]:
    """Return how a comparison was refused."""
    done = office.command("report", "job.yaml", "--json", "--compare", what)
    return done.code, done.stderr


@pytest.mark.long
def test_two_orders_of_providers_with_two_ledgers(tmp_path: Path, office: Office) -> None:
    """Each side as it was, and the leads that both asked for like with like."""
    office.write_job(enrichments="[833, 966]")
    office.write_leads(people(60))
    office.write_leads(people(60, start=20), name="later.csv")
    other(office, input="later.csv", enrichments="[701]")
    with serving(tmp_path / "api.db", replace(CALM, charge_misses=True)) as api:
        receipts = [run(office, api), run(office, api, "other.yaml")]
        bought = api.audit()["runs"]
    told = compared(office, "other.yaml")

    for side, receipt, label in zip((told["left"], told["right"]), receipts, ("job.yaml", "other.yaml"), strict=True):
        assert side["label"] == label
        assert (side["asked"], side["found"], side["not_found"]) == (60, receipt["found"], receipt["not_found"])
        assert side["credits"] == pytest.approx(receipt["credits_spent"])
        assert side["cost_per_hit"] == pytest.approx(receipt["credits_spent"] / receipt["found"])
    assert told["left"]["providers"] == ["Mailhound", "Peoplegrid"]
    assert told["right"]["providers"] == ["Inboxly"]
    left, right = answers(office, "out.csv"), answers(office, "other.csv")
    both = left.keys() & right.keys()
    assert told["common"] == len(both) == 40
    assert told["both"] == sum(left[lead] and right[lead] for lead in both)
    assert told["only_left"] == sum(left[lead] and not right[lead] for lead in both)
    assert told["only_right"] == sum(right[lead] and not left[lead] for lead in both)
    assert told["neither"] == sum(not left[lead] and not right[lead] for lead in both)
    for name, providers in (("common_left_credits", [833, 966]), ("common_right_credits", [701])):
        spent = [each["credits"] for each in bought if each["enrichments"] == providers]
        common = [
            each["credits"]
            for each in bought
            if each["enrichments"] == providers and each["params"]["first_name"] in both
        ]
        assert len(spent) == 60
        assert told[name] == pytest.approx(sum(common))
    assert told["verdict"].startswith("`other.yaml` found ")
    assert "40 leads that both asked for" in told["verdict"]


def answers(office: Office, output: str) -> dict[str, bool]:
    """Tell of each lead whether it was found."""
    return {row["First Name"]: row["enrich_status"] == "found" for row in office.output(output)}


@pytest.mark.long
def test_two_jobs_with_one_ledger(api: Api, office: Office) -> None:
    """Another verifier makes another question; the same question is asked once, by whoever came first."""
    office.write_job(ledger="shared.db")
    office.write_leads(people(10))
    other(office, ledger="shared.db", email_verifier="10")
    other(office, "same", ledger="shared.db")
    for job in ("job.yaml", "other.yaml", "same.yaml"):
        run(office, api, job)

    told = compared(office, "other.yaml")
    assert (told["left"]["asked"], told["right"]["asked"], told["common"]) == (10, 10, 10)
    assert [each["name"] for each in told["right_providers"] if each["verifies"]] == ["Mailproof"]
    nothing = compared(office, "same.yaml")
    assert (nothing["right"]["asked"], nothing["right"]["cost_per_hit"], nothing["common"]) == (0, None, 0)
    assert nothing["verdict"].startswith("no lead was answered on both sides")


def test_two_executions(tmp_path: Path, office: Office) -> None:
    """The newest that was answered anything against an earlier one; a lead that was asked again is in both."""
    office.write_leads(people(12))
    with serving(tmp_path / "api.db") as api:
        first = run(office, api)
        api.reprice({833: 2, 966: 2, 701: 2, 745: 2})
        office.write_leads(people(15))
        office.write_job(policy="{refresh: {found: 0s, not_found: 0s}}")
        second = run(office, api)
        assert office.command("run", "job.yaml", "--limit", "0", api=api).code == 0  # is answered nothing
    told = compared(office, "1")

    assert [told[side]["label"] for side in ("left", "right")] == ["execution 2", "execution 1"]
    assert (told["left"]["asked"], told["right"]["asked"], told["common"]) == (15, 12, 12)
    assert told["left"]["credits"] == pytest.approx(second["credits_spent"])
    assert told["common_right_credits"] == pytest.approx(first["credits_spent"])
    assert told["common_left_credits"] > told["common_right_credits"]
    assert (told["both"], told["neither"]) == (first["found"], first["not_found"])
    assert "credits less per hit" in told["verdict"]
    assert compare_executions(load_job(office.job_file), 2).left.label == "execution 1"


@pytest.mark.long
def test_leads_in_bulk_cost_their_part_of_the_task(api: Api, office: Office) -> None:
    """The price is the task's; a lead that only one side asked for takes its part with it."""
    office.write_leads(people(8))
    other(office, input="few.csv", dispatch="{bulk: 5}", columns="{mail: email}")
    office.write_leads(people(5), name="few.csv")
    run(office, api)
    receipt = run(office, api, "other.yaml")

    told = compare_jobs(load_job(office.job_file), load_job(office.folder / "other.yaml"))
    assert told.common == 5
    assert told.common_right_credits == pytest.approx(receipt["credits_spent"])
    assert told.only_left == told.only_right == 0
    assert "found as many of the 5 leads" in told.verdict


def test_forgotten_leads_are_not_compared(api: Api, office: Office) -> None:
    """Nobody knows any more whom they were about: they are no common lead of each other."""
    office.write_leads(people(6))
    other(office)
    run(office, api)
    run(office, api, "other.yaml")
    for job in ("job.yaml", "other.yaml"):
        assert office.command("forget", job, "--match", "First Name=First1", "--yes").code == 0
        assert office.command("forget", job, "--match", "First Name=First2", "--yes").code == 0

    told = compared(office, "other.yaml")
    assert (told["left"]["asked"], told["common"]) == (6, 4)


def test_what_cannot_be_compared_says_why(api: Api, office: Office) -> None:
    """Itself, an execution that is none of the job's, a job that never ran, one that is not there."""
    office.write_leads(people(2))
    other(office)
    assert refused(office, "1")[0] == 5
    run(office, api)

    assert refused(office, "1") == (5, "error: --compare 1: no other execution of job was answered anything\n")
    code, said = refused(office, "7")
    assert code == 2
    assert "job has no execution 7" in said
    assert refused(office, "job.yaml")[0] == 2
    code, said = refused(office, "other.yaml")
    assert code == 5
    assert "other has never run" in said
    code, said = refused(office, "third.yaml")
    assert code == 2
    assert "third.yaml" in said


def test_a_comparison_names_no_lead(api: Api, office: Office) -> None:
    """It is part of a report that may be passed on."""
    office.write_leads(people(4))
    other(office)
    run(office, api)
    run(office, api, "other.yaml")
    said = json.dumps(compared(office, "other.yaml"))
    assert "First1" not in said
    assert "company1" not in said


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(one: int, other_: int) -> None:
    """Counted out in whole numbers."""
    both = one + other_
    tail = sum(Fraction(comb(both, chosen), 2**both) for chosen in range(min(one, other_) + 1))
    exact = 1.0 if one == other_ else float(min(Fraction(1), 2 * tail))
    assert mcnemar(one, other_) == pytest.approx(exact)
    assert mcnemar(one, other_) == mcnemar(other_, one)


def test_mcnemar_of_very_many_agrees_with_the_exact_one() -> None:
    """Where the normal distribution takes over nothing jumps, and millions take no time."""
    exact, near = mcnemar(460, 540), mcnemar(460, 541)
    assert near == pytest.approx(exact, rel=0.15)
    assert mcnemar(1_000_000, 1_010_000) < 1e-6


def comparison(leads: tuple[int, int, int, int], left: float, right: float) -> Comparison:
    """Make a comparison of the leads that both asked for: found by both, only left, only right, neither."""
    sides = [Side(label, (), 0, 0, 0, 0.0, None) for label in ("a.yaml", "b.yaml")]
    return Comparison(sides[0], sides[1], (), (), sum(leads), *leads, left, right, "")


@in_turn(
    ("told", "unknown", "said"),
    [
        (
            comparison((60, 29, 41, 20), 89 * 0.50, 101 * 0.39),
            0,
            (
                "`b.yaml` found 12 more of the 150 leads that both asked for (41 only there, 29 only here: may be "
                "chance) at 0.11 credits less per hit"
            ),
        ),
        (
            comparison((60, 40, 0, 0), 100, 90),
            0,
            (
                "`b.yaml` found 40 fewer of the 100 leads that both asked for (0 only there, 40 only here: no chance: "
                "p < 0.001) at 0.50 credits more per hit"
            ),
        ),
        (
            comparison((60, 5, 17, 0), 65, 77),
            0,
            (
                "`b.yaml` found 12 more of the 82 leads that both asked for (17 only there, 5 only here: hardly "
                "chance: p = 0.017) at the same cost per hit"
            ),
        ),
        (
            comparison((1, 0, 0, 0), 1, 1),
            1,
            (
                "`b.yaml` found as many of the 1 lead that both asked for (0 only there, 0 only here); what that "
                "cost is not known of 1 answer"
            ),
        ),
        (
            comparison((0, 0, 0, 3), 1, 2.5),
            0,
            (
                "`b.yaml` found as many of the 3 leads that both asked for (0 only there, 0 only here) "
                "at 1.50 credits more"
            ),
        ),
        (
            comparison((0, 0, 0, 0), 0, 0),
            0,
            "no lead was answered on both sides: compare the rates with care, the leads differ",
        ),
    ],
)
def test_the_verdict_is_one_sentence(told: Comparison, unknown: int, said: str) -> None:
    """Who found more for less, and how sure that is."""
    assert verdict(told, unknown) == said
