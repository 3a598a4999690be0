"""The happy way of a row, end to end."""

from __future__ import annotations

from tests.harness import Api, Office, people


def test_a_csv_of_leads_comes_back_enriched(api: Api, office: Office) -> None:
    """Every row comes back in order, with the new columns and its status."""
    leads = people(60)
    office.write_leads(leads)

    done = office.enrich("run", "job.yaml", "--json", api=api)

    assert done.code == 0, done.stderr
    assert done.receipt["rows"] == done.receipt["requests"] == done.receipt["submitted"] == 60
    output = office.output()
    assert [row["First Name"] for row in output] == [lead[0] for lead in leads]
    assert {row["enrich_status"] for row in output} == {"found", "not_found"}
    assert all(bool(row["work_email"]) == (row["enrich_status"] == "found") for row in output)
    audit = api.audit()
    assert audit["accepted"] == 60
    assert audit["paid_twice"] == 0
    assert sum(float(row["enrich_credits"] or 0) for row in output) == audit["credits_charged"]


def test_the_second_night_pays_nothing(api: Api, office: Office) -> None:
    """The same command again answers from the ledger and writes the same output."""
    office.write_leads(people(20))
    office.enrich("run", "job.yaml", api=api)
    first = office.output()

    done = office.enrich("run", "job.yaml", "--json", api=api)

    assert done.code == 0
    assert (done.receipt["submitted"], done.receipt["reused"], done.receipt["credits_spent"]) == (0, 20, 0)
    assert office.output() == first
    assert api.audit()["accepted"] == 20
