"""The files beside the output: what to mend and feed back, and what is new since the last time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import BOTH_IN_TIME, Api, Office, people, serving


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """An API that finds everybody."""
    with serving(tmp_path / "api.db", hit_rate=1.0) as served:
        yield served


@pytest.fixture
def office(office: Office) -> Office:
    """Six leads, of which one cannot be asked."""
    rows = people(6)
    rows[3][0] = ""
    office.write_leads(rows)
    return office


def feed(office: Office, api: Api, *words: str) -> list[dict[str, str]]:
    """Run, and read the change feed."""
    done = office.command("run", "job.yaml", "--json", *words, api=api)
    assert done.code == 0, done.stderr
    changes = office.output("changes.csv")
    assert done.receipt["changed"] == len(changes)
    return changes


def test_rejects_can_be_mended_and_fed_back(office: Office, api: Api) -> None:
    """They have the input's columns and the reason; mended, they are asked and nobody else is."""
    office.write_job(rejects="rejects.csv")
    done = office.command("run", "job.yaml", "--json", api=api)
    assert (done.code, done.receipt["rejected"]) == (0, 1)
    (reject,) = office.output("rejects.csv")
    assert reject["Last Name"] == "Last3"
    assert (reject["enrich_status"], "first_name is empty" in reject["enrich_error"]) == ("invalid", True)
    assert (office.folder / "rejects.csv").stat().st_mode & 0o777 == 0o600

    mended = office.folder / "mended.csv"
    text = (office.folder / "rejects.csv").read_text(encoding="utf-8")
    mended.write_text(text.replace("\n,Last3", "\nFirst3,Last3"), encoding="utf-8")
    done = office.command("run", "job.yaml", "--input", "mended.csv", "--output", "m.csv", "--json", api=api)

    assert (done.code, done.receipt["submitted"], done.receipt["rejected"]) == (0, 1, 0)
    assert office.output("rejects.csv") == []


def test_failed_rows_are_rejects(tmp_path: Path) -> None:
    """Those that the API failed are there with what it said."""
    office = Office(tmp_path)
    office.write_job(rejects="rejects.csv")
    office.write_leads(people(4))
    with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        done = office.command("run", "job.yaml", "--json", api=api)
    assert done.code == 10
    rejects = office.output("rejects.csv")
    assert len(rejects) == done.receipt["rejected"] == 4
    assert all(row["enrich_status"] == "failed" and row["enrich_error"] for row in rejects)


def test_the_feed_tells_what_is_new_and_then_nothing(office: Office, api: Api) -> None:
    """One line a field with its key, and no line twice."""
    office.write_job(changes="{path: changes.csv, key: [Last Name, Note]}")
    changes = feed(office, api)
    found = [row for row in office.output() if row["enrich_status"] == "found"]
    assert [(line["Last Name"], line["Note"], line["field"], line["old"], line["new"]) for line in changes] == [
        (row["Last Name"], row["Note"], "work_email", "", row["work_email"]) for row in found
    ]
    assert found
    assert all(line["provider"] and line["at"].endswith("Z") for line in changes)

    assert feed(office, api) == []


def test_a_new_lead_that_was_answered_before_is_news(office: Office, api: Api) -> None:
    """The CRM has not heard of it under this key, though nothing is paid for."""
    office.write_job(changes="{path: changes.csv, key: Note}")
    feed(office, api)
    rows = people(3)
    rows.append([*rows[0][:4], "the same lead in another record"])
    office.write_leads(rows)

    changes = feed(office, api)

    told = {line["Note"] for line in changes}
    first = next(row for row in office.output() if row["Note"] == "note 0")
    assert told == ({"the same lead in another record"} if first["work_email"] else set())
    assert api.audit()["accepted"] == 5


def test_a_refresh_tells_old_and_new(office: Office, api: Api) -> None:
    """Only what is another value now is a change."""
    office.write_job(changes="changes.csv")
    feed(office, api)
    office.write_job(changes="changes.csv", policy="{refresh: {found: 0s, not_found: 0s}}")
    # The sandbox knows the same people: the answers are newer, the values are not.
    assert feed(office, api) == []


def test_in_place_the_old_value_is_the_inputs(office: Office, api: Api) -> None:
    """With merge the feed compares with the cell that the CRM has."""
    rows = people(6)
    for row in rows:
        row[3] = "stale@crm.example"
    office.write_leads(rows)
    text = office.write_job(merge="overwrite", changes="{path: changes.csv, key: Note}").read_text(encoding="utf-8")
    office.job_file.write_text(text.replace("work_email: email", "Email: email"), encoding="utf-8")

    changes = feed(office, api)

    found = {row["Note"]: row["Email"] for row in office.output() if row["enrich_status"] == "found"}
    assert {line["Note"]: (line["field"], line["old"], line["new"]) for line in changes} == {
        note: ("Email", "stale@crm.example", email) for note, email in found.items()
    }


def test_a_feed_that_could_not_be_written_is_told_again(office: Office, api: Api) -> None:
    """What nobody could read was not told."""
    office.write_job(changes="feeds/changes.csv")
    (office.folder / "feeds" / "changes.csv").mkdir(parents=True)
    assert office.command("run", "job.yaml", api=api).code == 5
    (office.folder / "feeds" / "changes.csv").rmdir()
    assert office.command("run", "job.yaml", "--json", api=api).receipt["changed"]


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"changes": "{path: changes.csv, key: [Nota]}"}, "no column `Nota`"),
        ({"rejects": "out.csv"}, "written twice"),
        ({"rejects": "x.csv", "changes": "x.csv"}, "written twice"),
        ({"rejects": "leads.csv"}, "replace the input"),
        ({"rejects": "alias/out.csv"}, "it is `output`"),
        ({"suppress": "never.csv", "rejects": "never.csv"}, "it is `suppress`"),
        ({"rejects": "feed.csv", "changes": "feed.csv"}, "it is `rejects`"),
    ],
)
def test_a_wrong_feed_is_found_before_anything_is_spent(
    office: Office, api: Api, replaced: dict[str, str], words: str
) -> None:
    """Exit 2, with the key of the job file."""
    (office.folder / "alias").symlink_to(office.folder)
    (office.folder / "never.csv").write_text("nobody.example\n")
    office.write_job(**replaced)
    done = office.command("run", "job.yaml", api=api)
    assert (done.code, words in done.stderr) == (2, True), done.stderr
    assert api.audit()["accepted"] == 0


def test_collect_spares_the_feeds_too(office: Office, api: Api) -> None:
    """An output from the command line must not replace the rejects."""
    office.write_job(rejects="rejects.csv")
    assert office.command("run", "job.yaml", api=api).code == 0
    done = office.command("collect", "job.yaml", "--output", "rejects.csv")
    assert (done.code, "written twice" in done.stderr) == (2, True)
    assert len(office.output("rejects.csv")) == 1
