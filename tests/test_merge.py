"""Completing a CRM export in place: new values land in columns that the input has, and a miss blanks nothing."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from tests.harness import BOTH_IN_TIME, HEADER, JOB, Api, Office, people, serving

MERGING = JOB.replace("work_email: email", "Email: email")


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """A calm API."""
    with serving(tmp_path / "api.db") as served:
        yield served


@pytest.fixture
def office(office: Office) -> Office:
    """Eight leads, half of them with an address already, one with blanks for one."""
    rows = people(8)
    for number, row in enumerate(rows):
        row[3] = f"old{number}@crm.example" if number % 2 else ""
    rows[2][3] = "  "
    office.write_leads(rows)
    return office


def emails(office: Office, api: Api, merge: str) -> tuple[list[str], list[str], list[str]]:
    """Run the job; return the column before and after, and the rows' status."""
    office.write_job(MERGING, merge=merge)
    with (office.folder / "leads.csv").open(newline="", encoding="utf-8") as file:
        before = [row["Email"] for row in csv.DictReader(file)]
    assert office.command("run", "job.yaml", api=api).code == 0
    rows = office.output()
    assert list(rows[0])[: len(HEADER)] == HEADER
    return before, [row["Email"] for row in rows], [row["enrich_status"] for row in rows]


def test_blank_cells_are_filled(office: Office, api: Api) -> None:
    """What was there stays, blanks get what was found, and a miss leaves the very text."""
    before, after, status = emails(office, api, "fill_empty")
    assert {"found", "not_found"} <= set(status)
    for old, new, told in zip(before, after, status, strict=True):
        if told == "found" and not old.strip():
            assert "@" in new
            assert not new.startswith("old")
        else:
            assert new == old


def test_what_was_found_overwrites(office: Office, api: Api) -> None:
    """A miss still blanks nothing."""
    before, after, status = emails(office, api, "overwrite")
    for old, new, told in zip(before, after, status, strict=True):
        assert (new == old) is (told != "found")
        assert new or not old


def test_without_merge_the_clash_is_a_mistake_of_the_job(office: Office, api: Api) -> None:
    """The hint names the way out; nothing is spent."""
    office.write_job(MERGING)
    done = office.command("run", "job.yaml", api=api)
    assert (done.code, "merge: fill_empty" in done.stderr) == (2, True)
    assert api.audit()["accepted"] == 0


def test_only_if_empty_asks_for_the_gaps_alone(office: Office, api: Api) -> None:
    """Rows that have an address are neither asked nor changed."""
    office.write_job(MERGING, merge="fill_empty", only_if_empty="[Email]")
    done = office.command("run", "job.yaml", "--json", api=api)
    assert (done.code, done.receipt["submitted"], done.receipt["filtered"]) == (0, 4, 4)
    assert [row["Email"] for row in office.output()][1::2] == [f"old{number}@crm.example" for number in (1, 3, 5, 7)]


def test_new_columns_may_stand_beside_merged_ones(office: Office, api: Api) -> None:
    """A column that the input lacks is added behind it, as ever."""
    both = "{Email: email, found_email: email}"
    office.write_job(JOB.replace("columns:\n  work_email: email", f"columns: {both}"), merge="overwrite")
    assert office.command("run", "job.yaml", api=api).code == 0
    for row in office.output():
        assert not row["found_email"] or row["found_email"] == row["Email"]


def test_the_inputs_own_formulas_stay_as_they_are(tmp_path: Path) -> None:
    """Only what is found is made safe for spreadsheets: the rest is the very text it was."""
    office = Office(tmp_path)
    rows = people(6)
    for row in rows[:3]:
        row[4] = "=1+1"
    office.write_leads(rows)
    job = JOB.replace("work_email: email", "Note: email")
    with serving(tmp_path / "api.db") as api:
        office.write_job(job, merge="fill_empty")
        assert office.command("run", "job.yaml", api=api).code == 0
        assert [row["Note"] for row in office.output()][:3] == ["=1+1"] * 3
        office.write_job(job, merge="fill_empty", output="out.parquet")
        assert office.command("run", "job.yaml", api=api).code == 0
    assert pl.read_parquet(tmp_path / "out.parquet")["Note"].to_list()[:3] == ["=1+1"] * 3


def test_the_merged_output_can_be_tomorrows_input(office: Office, api: Api) -> None:
    """Fed back, it asks nothing new and stays as it is."""
    office.write_job(MERGING, merge="fill_empty")
    assert office.command("run", "job.yaml", api=api).code == 0
    first = (office.folder / "out.csv").read_text(encoding="utf-8")
    paid = api.audit()["accepted"]
    assert office.command("run", "job.yaml", "--input", "out.csv", "--output", "again.csv", api=api).code == 0
    assert (office.folder / "again.csv").read_text(encoding="utf-8") == first
    assert api.audit()["accepted"] == paid
