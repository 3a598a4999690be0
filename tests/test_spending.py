"""Spending where it matters: `order_by`, `caps`, `--sample`, `--limit`, `min_balance`, by the API's own audit."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from enrich.model import State
from enrich.rows import Rows
from enrich.surroundings import Options
from tests.harness import BOTH_IN_TIME, Api, Office, people, serving

#: What one request of the standard job may cost at worst, in credits.
WORST = 3.51
HEADER = ["First Name", "Last Name", "Website", "Email", "Size"]


@pytest.fixture(params=BOTH_IN_TIME)
def where(request: pytest.FixtureRequest) -> str:
    """Ask the same of a ledger in a file and on a server."""
    return str(request.param)


def sized(*sizes: str) -> list[list[str]]:
    """Make leads of companies of these sizes."""
    return [[*lead[:4], size] for lead, size in zip(people(len(sizes)), sizes, strict=True)]


def firm(number: int, website: str) -> list[str]:
    """Make a lead of a company."""
    return [f"First{number}", f"Last{number}", website, "", ""]


def asked(api: Api) -> set[str]:
    """Whom the API was asked about, by their first names."""
    return {run["params"]["first_name"] for run in api.audit()["runs"]}


def statuses(office: Office) -> list[str]:
    """The rows' status, `capped` where that is the reason, and `answered` with or without luck."""
    told = {"found": "answered", "not_found": "answered"}
    return [
        "capped" if "capped" in row["enrich_error"] else told.get(row["enrich_status"], row["enrich_status"])
        for row in office.output()
    ]


# order_by


def test_the_largest_are_asked_first(api: Api, office: Office) -> None:
    """Night by night, in the order of the column; the output keeps the file's order."""
    office.write_job(order_by="Size")
    office.write_leads(sized("5", "", "1,200", "900", "n/a", "51-200"), HEADER)

    nights: list[str] = []
    for _ in range(6):
        before = asked(api)
        office.run(api, Options(limit=1))
        nights += asked(api) - before

    assert nights == ["First2", "First3", "First5", "First0", "First4", "First1"]
    assert [row["First Name"] for row in office.output()] == [f"First{n}" for n in range(6)]


def test_a_column_that_the_input_lacks_is_named(api: Api, office: Office) -> None:
    """Like every column of the job file."""
    office.write_leads(people(1))
    for key, value in (("order_by", "Siez"), ("caps", "{by: Notte, max: 1}")):
        office.write_job(**{key: value})
        done = office.command("run", "job.yaml", api=api)
        assert (done.code, f"job.yaml:12: {key}" in done.stderr) == (2, True), done.stderr


def test_rows_that_come_while_the_order_is_read_are_last(
    api: Api, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that grows under the run's eyes is no bug."""
    office.write_job(order_by="Note")
    office.write_leads(people(4))
    monkeypatch.setattr(Rows, "order", lambda _: pl.Series([1, 0]))
    office.run(api, Options(limit=3))
    assert asked(api) == {"First0", "First1", "First2"}


# caps


@pytest.mark.parametrize("by", ["company", "Website"])
def test_a_cap_holds_over_the_nights(api: Api, office: Office, by: str) -> None:
    """Who was paid for counts first; new leads get what is left of their company's share, at last nothing."""
    office.write_job(caps=f"{{by: {by}, max: 2}}")
    office.write_leads([firm(1, "acme.example"), firm(2, "beta.example")])
    office.run(api)
    office.write_leads([firm(n, " ACME.example ") for n in (7, 8, 9)] + [firm(1, "acme.example")])
    office.run(api)
    night = office.run(api)

    assert asked(api) == {"First1", "First2", "First7"}
    assert statuses(office)[1:3] == ["capped", "capped"]
    assert (night.submitted, night.pending, night.filtered) == (0, 0, 2)


def test_blanks_are_no_group(api: Api, office: Office) -> None:
    """Rows where the column is blank are not capped."""
    office.write_job(caps="{by: Email, max: 1}")
    office.write_leads(people(4))
    assert office.run(api).submitted == 4


def test_a_constant_is_one_group(api: Api, office: Office) -> None:
    """A param that is the same for all caps all."""
    params = "{first_name: First Name, last_name: Last Name, company: {value: acme.example}}"
    office.write_job(caps="{by: company, max: 3}", params=params)
    office.write_leads(people(5))
    assert office.run(api).submitted == 3


def test_a_cap_leaves_retries_and_refreshes_alone(tmp_path: Path, office: Office) -> None:
    """Both were paid for before: the cap is about new leads."""
    office.write_job(caps="{by: company, max: 1}")
    office.write_leads([firm(1, "acme.example")])
    with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        office.run(api)
    office.write_leads([firm(0, "acme.example"), firm(1, "acme.example")])
    with serving(tmp_path / "api.db", hit_rate=1.0, failure_rate=0.0) as api:
        night = office.run(api, Options(retry=frozenset({State.FAILED})))
    assert night.submitted == 1
    assert statuses(office)[0] == "capped"


def test_run_plan_and_collect_agree_about_the_capped(api: Api, office: Office) -> None:
    """With an order, a limit and a lead that came after the last run."""
    office.write_job(caps="{by: company, max: 2}", order_by="Note")
    leads = [[*firm(n, "acme.example")[:4], str(n)] for n in range(5)]
    office.write_leads(leads)
    office.run(api, Options(limit=1))
    assert asked(api) == {"First4"}
    assert statuses(office) == ["capped", "capped", "capped", "pending", "answered"]
    office.write_leads([*leads, [*firm(9, "acme.example")[:4], "9"]])

    told = office.command("plan", "job.yaml", "--json", api=api).receipt
    assert office.command("collect", "job.yaml", "--partial").code == 0
    collected = statuses(office)
    office.run(api)

    # The newcomer is the largest, so it takes the place that was left.
    assert (told["to_submit"], told["decisions"]["capped"]) == (1, 4)
    assert collected == ["capped", "capped", "capped", "capped", "answered", "pending"]
    assert statuses(office) == [*collected[:5], "answered"]
    assert asked(api) == {"First4", "First9"}


# --sample and --limit


def test_a_sample_is_spread_over_the_file(api: Api, office: Office) -> None:
    """One of each stretch; a sample larger than the file is the file."""
    office.write_leads(people(40))
    receipt = office.run(api, Options(sample=4, seed=3))
    assert (receipt.exit_code, receipt.submitted, receipt.pending) == (0, 4, 36)
    assert Counter(int(name.removeprefix("First")) // 10 for name in asked(api)) == {0: 1, 1: 1, 2: 1, 3: 1}

    assert office.run(api, Options(sample=10**15)).submitted == 36


def test_all_of_them_together(api: Api, office: Office) -> None:
    """Caps, then the sample of what they leave, then the largest of it up to the limit."""
    office.write_job(caps="{by: company, max: 1}", order_by="Size")
    rows = [[*firm(n, f"c{n // 2}.example")[:4], str(n)] for n in range(12)]
    office.write_leads(rows, HEADER)

    receipt = office.run(api, Options(sample=3, limit=2))

    assert (receipt.submitted, receipt.filtered, receipt.pending) == (2, 6, 4)
    stretches = sorted(int(name.removeprefix("First")) // 4 for name in asked(api))
    assert stretches == [1, 2]  # one of each third, of these the two with the largest numbers
    assert all(int(name.removeprefix("First")) % 2 for name in asked(api))


def test_numbers_may_be_as_large_as_you_like(api: Api, office: Office) -> None:
    """All is all."""
    office.write_job(caps=f"{{by: company, max: {10**30}}}", canary=f"{{rows: {10**30}, min_hit_rate: 1}}")
    office.write_leads(people(2))
    assert office.run(api, Options(limit=10**30, seed=10**30)).submitted == 2


def test_a_limit_is_of_requests_and_not_of_tries(tmp_path: Path, office: Office) -> None:
    """A task that failed at no charge is asked again in the same run: all that the limit allows come to an end."""
    office.write_job(policy="{max_attempts: 9}")
    office.write_leads(people(9))
    with serving(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
        receipt = office.run(api, Options(limit=3))
        assert {run["accepted"] for run in api.audit()["runs"]} != {1}
    assert receipt.pending == 6
    assert receipt.submitted > 3


# min_balance


@pytest.mark.long
def test_the_balance_never_falls_below_what_stays(tmp_path: Path, office: Office) -> None:
    """Whatever is in flight, in doubt or left from earlier runs."""
    office.write_job(limits="{requests_per_second: 1000, min_balance: 60}")
    office.write_leads(people(80))
    with serving(tmp_path / "api.db", balance=100.0, hit_rate=1.0, failure_rate=0.0, latency="fixed(60)") as api:
        first = office.run(api, Options(max_time_s=1.0))
        assert first.submitted <= 40 / WORST
        api.advance(90)
    with serving(tmp_path / "api.db", hit_rate=1.0, failure_rate=0.0, latency="fixed(0)") as api:
        api.fault("error-after", 2)
        second = office.run(api)
        audit = api.audit()
    assert second.exit_code == 12
    assert "has come down to `min_balance`" in str(second.error)
    assert audit["balance"] - audit["credits_reserved"] >= 60
    assert audit["paid_twice"] == 0


def test_a_balance_that_would_fall_below_is_refused(tmp_path: Path, office: Office) -> None:
    """Exit 5 before anything is sent; a run that wants nothing new is fine."""
    office.write_job(limits="{requests_per_second: 1000, min_balance: 8}")
    office.write_leads(people(1))
    with serving(tmp_path / "api.db", balance=11.0) as api:
        done = office.command("run", "job.yaml", api=api)
        assert (done.code, api.audit()["accepted"]) == (5, 0)
        assert "`min_balance` keeps 8 of them" in done.stderr
        assert office.run(api, Options(limit=0)).exit_code == 0


def test_the_tighter_of_two_caps_is_told(tmp_path: Path, office: Office) -> None:
    """`max_credits` and `min_balance` hold side by side."""
    office.write_leads(people(9))
    with serving(tmp_path / "api.db", balance=100.0, hit_rate=1.0) as api:
        for limits, says in (("max_credits: 5, min_balance: 10", "credits cap"), ("min_balance: 94", "min_balance")):
            office.write_job(limits=f"{{requests_per_second: 1000, in_flight: 1, {limits}}}")
            receipt = office.run(api)
            assert (receipt.exit_code, says in str(receipt.error)) == (12, True), receipt


def test_a_cap_that_cannot_be_kept_still_lets_collect_what_was_paid(
    tmp_path: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider without a price makes `max_credits` impossible: nothing is bought, what was bought is fetched."""
    office.write_leads(people(2))
    with serving(tmp_path / "api.db", latency="fixed(60)", hit_rate=1.0) as api:
        office.leave_at_the_api(api)
        api.advance(90)
        office.write_job(limits="{requests_per_second: 1000, max_credits: 50}")
        office.write_leads(people(4))
        monkeypatch.setattr("enrich.question._worst_price", lambda *_: None)
        receipt = office.run(api)
        again = office.command("run", "job.yaml", api=api)
        assert api.audit()["accepted"] == 2
    assert (receipt.exit_code, again.code) == (5, 5)
    assert "names no price" in str(receipt.error)
    with closing(office.ledger()) as ledger:
        assert ledger.counts()[State.FOUND] == 2
