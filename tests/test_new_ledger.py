"""A new ledger beside an output that another ledger paid for: refused, or asked about; never paid again in silence."""

from __future__ import annotations

import os
import shutil

import pytest

from enrich.errors import Refused
from enrich.surroundings import Options
from tests.cases import first_quick
from tests.harness import BOTH_IN_TIME, IN_A_FILE, Api, Office, people

RUN = ("run", "job.yaml", "--json")


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


@pytest.fixture
def office(office: Office) -> Office:
    """Have some leads."""
    office.write_leads(people(5))
    return office


def refused(office: Office, api: Api, *more: str) -> None:
    """Expect that nothing is sent off a terminal, however often it is tried, and that the ways out are named."""
    before = api.audit()["accepted"]
    for _ in range(2):
        done = office.command(*RUN, *more, "--yes", api=api)
        assert (done.code, done.receipt["exit_code"]) == (5, 5), done.stderr
        assert "was paid for from another ledger" in done.stderr
        assert "--new-ledger pays again" in done.stderr
    assert api.audit()["accepted"] == before


@IN_A_FILE
@pytest.mark.parametrize("how", first_quick(2, ["ledger removed", "folder removed", "another ledger", "renamed job"]))
def test_a_new_ledger_beside_a_paid_output_is_refused(api: Api, office: Office, how: str) -> None:
    """However it came to be new; with --new-ledger it pays."""
    office.run(api)
    more: tuple[str, ...] = ()
    match how:
        case "ledger removed":
            office.ledger_path.unlink()
        case "folder removed":
            shutil.rmtree(office.ledger_path.parent)
        case "another ledger":
            more = ("--ledger", "other.db")
        case _:
            office.write_job(name="renamed")

    refused(office, api, *more)

    done = office.command(*RUN, *more, "--new-ledger", api=api)
    assert (done.code, done.receipt["submitted"]) == (0, 5)
    assert office.command(*RUN, *more, api=api).receipt["reused"] == 5


def test_a_ledger_on_a_server_is_compared_too(api: Api, office: Office) -> None:
    """The output was written from a file before, or from another schema."""
    office.run(api)
    refused(office, api, "--ledger", f"{office.server or 'other.db'}".replace("schema=", "schema=other_"))


@IN_A_FILE
@pytest.mark.parametrize(
    "name",
    first_quick(
        2, ["o.csv.gz", "o.tsv", "o.jsonl", "o.parquet", "o.xlsx", "parts/", "o-%Y-%m-%d.csv", "runs/%Y/%m/o.csv"]
    ),
)
def test_every_kind_of_output_is_read(api: Api, office: Office, name: str) -> None:
    """Also one of another day."""
    office.write_job(output=name)
    assert office.run(api).exit_code == 0
    if "%d" in name:
        (found,) = office.folder.glob("o-*.csv")
        found.rename(office.folder / "o-2024-02-29.csv")
    shutil.rmtree(office.ledger_path.parent)

    refused(office, api)


@IN_A_FILE
def test_other_separators_and_encodings_are_read(api: Api, office: Office) -> None:
    """As the job writes them."""
    office.write_job(output="{path: o.csv, separator: ';', encoding: utf-16}")
    assert office.run(api).exit_code == 0
    shutil.rmtree(office.ledger_path.parent)

    refused(office, api)


@IN_A_FILE
def test_the_newest_output_counts(api: Api, office: Office) -> None:
    """An older one may be of any ledger."""
    office.write_job(output="o-%Y-%m-%d.csv")
    assert office.run(api).exit_code == 0
    (paid,) = office.folder.glob("o-*.csv")
    paid.rename(office.folder / "o-2024-01-01.csv")
    os.utime(office.folder / "o-2024-01-01.csv", (1, 1))
    (office.folder / "o-2024-01-02.csv").write_text("Name\nAda\n")
    shutil.rmtree(office.ledger_path.parent)

    assert office.command(*RUN, api=api).code == 0


@IN_A_FILE
@pytest.mark.parametrize(
    "text",
    first_quick(1, ["", "Name\nAda\n", "enrich_task_id\n\n", 'First Name,enrich_task_id\n"a\nb",\n']),
    ids=["empty", "another file", "no ids", "blank"],
)
def test_an_output_without_tasks_is_no_reason(api: Api, office: Office, text: str) -> None:
    """It was not paid for; an empty or broken one is replaced."""
    (office.folder / "out.csv").write_text(text)

    assert office.command(*RUN, api=api).code == 0


@IN_A_FILE
def test_an_output_that_cannot_be_read_is_a_note(api: Api, office: Office) -> None:
    """The run goes on, and the receipt says what is not known."""
    (office.folder / "out.csv").write_bytes(b"\xff\xfe\x00enrich_task_id\n\x81\n")

    done = office.command(*RUN, api=api)

    assert done.code == 0, done.stderr
    assert any("not known" in note for note in done.receipt["notes"])


@IN_A_FILE
def test_an_output_of_the_sandbox_is_no_reason(api: Api, office: Office) -> None:
    """Neither is a rehearsal after a real run."""
    assert office.command(*RUN, "--sandbox").code == 0
    assert office.command(*RUN, api=api).code == 0
    assert office.command(*RUN, "--sandbox").code == 0
    (office.ledger_path.parent / "job.db").unlink()
    assert office.command(*RUN, api=api).code == 0
    assert api.audit()["accepted"] == 10


@IN_A_FILE
def test_an_input_that_was_an_output_is_no_reason(api: Api, office: Office) -> None:
    """Its columns are replaced, as ever."""
    office.run(api)
    (office.folder / "out.csv").rename(office.folder / "leads.csv")
    office.write_job(merge="fill_empty")
    shutil.rmtree(office.ledger_path.parent)

    assert office.command(*RUN, api=api).code == 0


def test_on_a_terminal_the_person_is_asked(api: Api, office: Office) -> None:
    """No: one line, exit 5, no run on record. Yes: it pays."""
    office.run(api)
    other = Office(office.folder, office.server and office.server.replace("schema=", "schema=other_"), office.environ)
    other.write_job(name="other", ledger=other.server or ".enrich/other.db")
    asked: list[str] = []

    def confirm(text: str) -> bool:
        asked.append(text)
        return len(asked) > 1

    with pytest.raises(Refused) as no:
        other.run(api, Options(confirm_new_ledger=confirm))
    assert (no.value.message, no.value.hint) == ("cancelled: nothing was sent", None)
    receipt = other.run(api, Options(confirm_new_ledger=confirm))

    assert (receipt.exit_code, receipt.submitted, receipt.execution) == (0, 5, 1)
    assert len(asked) == 2
    assert "out.csv was paid for from another ledger" in asked[0]
