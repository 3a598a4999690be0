"""Limits on spending: `order_by`, `caps`, `--sample`, `--limit`, `min_balance`, checked against the API's audit."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from enrich.ledger import queries
from enrich.models import State
from enrich.rows.job_input import JobInput
from enrich.run.context import RunOptions
from tests.support.cases import first_quick
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads, serve_api

#: The maximum price of one request of the standard job, in credits.
MAX_PRICE = 3.51
HEADER = ["First Name", "Last Name", "Website", "Email", "Size"]


def leads_of_sizes(*sizes: str) -> list[list[str]]:
    """Make leads of companies of these sizes."""
    return [[*lead[:4], size] for lead, size in zip(make_leads(len(sizes)), sizes, strict=True)]


def lead_of_company(number: int, website: str) -> list[str]:
    """Make a lead of a company."""
    return [f"First{number}", f"Last{number}", website, "", ""]


def requested_leads(api: SandboxApi) -> set[str]:
    """Return the first names of the leads that were sent."""
    return {run["params"]["first_name"] for run in api.audit()["runs"]}


def row_statuses(workspace: Workspace) -> list[str]:
    """Return the rows' statuses: `capped` where that is the reason, `answered` for match and no match."""
    result = {"found": "answered", "not_found": "answered"}
    return [
        "capped" if "per-group limit" in row["enrich_error"] else result.get(row["enrich_status"], row["enrich_status"])
        for row in workspace.read_output()
    ]


# order_by


@BOTH_BACKENDS
@pytest.mark.long
def test_order_by_largest_first(api: SandboxApi, workspace: Workspace) -> None:
    """Sends the largest values of the column first, run by run; the output keeps the file's order."""
    workspace.write_job(order_by="Size")
    workspace.write_leads(leads_of_sizes("5", "", "1,200", "900", "n/a", "51-200"), HEADER)

    runs: list[str] = []
    for _ in range(6):
        before = requested_leads(api)
        workspace.run_job(api, RunOptions(limit=1))
        runs += requested_leads(api) - before

    assert runs == ["First2", "First3", "First5", "First0", "First4", "First1"]
    assert [row["First Name"] for row in workspace.read_output()] == [f"First{n}" for n in range(6)]


def test_unknown_order_column(api: SandboxApi, workspace: Workspace) -> None:
    """Reports an unknown column like every other column of the job file."""
    workspace.write_leads(make_leads(1))
    for key, value in (("order_by", "Siez"), ("caps", "{by: Notte, max: 1}")):
        workspace.write_job(**{key: value})
        result = workspace.run_in_process("run", "job.yaml", api=api)
        assert (result.exit_code, f"job.yaml:12: {key}" in result.stderr) == (2, True), result.stderr


@BOTH_BACKENDS
def test_rows_added_while_sorting(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that grows during the run is no bug."""
    workspace.write_job(order_by="Note")
    workspace.write_leads(make_leads(4))
    monkeypatch.setattr(JobInput, "queue_order", lambda *_: pl.Series([1, 0]))
    workspace.run_job(api, RunOptions(limit=3))
    assert requested_leads(api) == {"First0", "First1", "First2"}


# caps


@pytest.mark.parametrize("by", first_quick(1, ["company", "Website"]))
def test_cap_over_several_runs(api: SandboxApi, workspace: Workspace, by: str) -> None:
    """Paid leads count first; new leads get the rest of their company's limit, then nothing."""
    workspace.write_job(caps=f"{{by: {by}, max: 2}}")
    workspace.write_leads([lead_of_company(1, "acme.example"), lead_of_company(2, "beta.example")])
    workspace.run_job(api)
    workspace.write_leads(
        [lead_of_company(n, " ACME.example ") for n in (7, 8, 9)] + [lead_of_company(1, "acme.example")]
    )
    workspace.run_job(api)
    summary = workspace.run_job(api)

    assert requested_leads(api) == {"First1", "First2", "First7"}
    assert row_statuses(workspace)[1:3] == ["capped", "capped"]
    assert (summary.submitted, summary.pending, summary.filtered) == (0, 0, 2)


def test_blank_groups_are_not_capped(api: SandboxApi, workspace: Workspace) -> None:
    """Rows with a blank in the column are not capped."""
    workspace.write_job(caps="{by: Email, max: 1}")
    workspace.write_leads(make_leads(4))
    assert workspace.run_job(api).submitted == 4


def test_cap_by_constant_param(api: SandboxApi, workspace: Workspace) -> None:
    """A param that is the same for all rows caps all of them."""
    params = "{first_name: First Name, last_name: Last Name, company: {value: acme.example}}"
    workspace.write_job(caps="{by: company, max: 3}", params=params)
    workspace.write_leads(make_leads(5))
    assert workspace.run_job(api).submitted == 3


@pytest.mark.long
def test_cap_ignores_retries_and_refreshes(tmp_path: Path, workspace: Workspace) -> None:
    """Retries and refreshes do not count, because the cap is for new leads."""
    workspace.write_job(caps="{by: company, max: 1}")
    workspace.write_leads([lead_of_company(1, "acme.example")])
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        workspace.run_job(api)
    workspace.write_leads([lead_of_company(0, "acme.example"), lead_of_company(1, "acme.example")])
    with serve_api(tmp_path / "api.db", hit_rate=1.0, failure_rate=0.0) as api:
        summary = workspace.run_job(api, RunOptions(retry=frozenset({State.FAILED})))
    assert summary.submitted == 1
    assert row_statuses(workspace)[0] == "capped"


@BOTH_BACKENDS
@pytest.mark.long
def test_run_plan_and_collect_agree_on_capped(api: SandboxApi, workspace: Workspace) -> None:
    """run, plan and collect agree, with an order, a limit and a lead that came after the last run."""
    workspace.write_job(caps="{by: company, max: 2}", order_by="Note")
    leads = [[*lead_of_company(n, "acme.example")[:4], str(n)] for n in range(5)]
    workspace.write_leads(leads)
    workspace.run_job(api, RunOptions(limit=1))
    assert requested_leads(api) == {"First4"}
    assert row_statuses(workspace) == ["capped", "capped", "capped", "pending", "answered"]
    workspace.write_leads([*leads, [*lead_of_company(9, "acme.example")[:4], "9"]])

    output = workspace.run_in_process("plan", "job.yaml", "--json", api=api).json_output
    assert workspace.run_in_process("collect", "job.yaml", "--partial").exit_code == 0
    collected = row_statuses(workspace)
    workspace.run_job(api)

    # The new lead is the largest, so it takes the free place.
    assert (output["to_submit"], output["decisions"]["capped"]) == (1, 4)
    assert collected == ["capped", "capped", "capped", "capped", "answered", "pending"]
    assert row_statuses(workspace) == [*collected[:5], "answered"]
    assert requested_leads(api) == {"First4", "First9"}


# --sample and --limit


@pytest.mark.long
def test_sample_is_spread(api: SandboxApi, workspace: Workspace) -> None:
    """Takes one row of each part of the file; a sample larger than the file is the whole file."""
    workspace.write_leads(make_leads(40))
    summary = workspace.run_job(api, RunOptions(sample=4, seed=3))
    assert (summary.exit_code, summary.submitted, summary.pending) == (0, 4, 36)
    assert Counter(int(name.removeprefix("First")) // 10 for name in requested_leads(api)) == {0: 1, 1: 1, 2: 1, 3: 1}

    assert workspace.run_job(api, RunOptions(sample=10**15)).submitted == 36


@pytest.mark.long
def test_caps_sample_and_limit_together(api: SandboxApi, workspace: Workspace) -> None:
    """Applies caps, then the sample of the rest, then the largest of it up to the limit."""
    workspace.write_job(caps="{by: company, max: 1}", order_by="Size")
    rows = [[*lead_of_company(n, f"c{n // 2}.example")[:4], str(n)] for n in range(12)]
    workspace.write_leads(rows, HEADER)

    summary = workspace.run_job(api, RunOptions(sample=3, limit=2))

    assert (summary.submitted, summary.filtered, summary.pending) == (2, 6, 4)
    parts = sorted(int(name.removeprefix("First")) // 4 for name in requested_leads(api))
    assert parts == [1, 2]  # one of each third, and of these the two with the largest numbers
    assert all(int(name.removeprefix("First")) % 2 for name in requested_leads(api))


@pytest.mark.long
def test_very_large_limits(api: SandboxApi, workspace: Workspace) -> None:
    """A limit above the number of rows means all rows."""
    workspace.write_job(caps=f"{{by: company, max: {10**30}}}", canary=f"{{rows: {10**30}, min_hit_rate: 1}}")
    workspace.write_leads(make_leads(2))
    assert workspace.run_job(api, RunOptions(limit=10**30, seed=10**30)).submitted == 2


@pytest.mark.long
def test_limit_counts_requests_not_attempts(tmp_path: Path, workspace: Workspace) -> None:
    """A free failure is retried in the same run: all requests within the limit are finished."""
    workspace.write_job(policy="{max_attempts: 9}")
    workspace.write_leads(make_leads(9))
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=1.0) as api:
        summary = workspace.run_job(api, RunOptions(limit=3))
        assert {run["accepted"] for run in api.audit()["runs"]} != {1}
    assert summary.pending == 6
    assert summary.submitted > 3


# min_balance


@pytest.mark.long
def test_min_balance_is_kept(tmp_path: Path, workspace: Workspace) -> None:
    """Keeps the minimum balance whatever is in flight, in doubt or left from earlier runs."""
    workspace.write_job(limits="{requests_per_second: 1000, min_balance: 60}")
    workspace.write_leads(make_leads(80))
    with serve_api(tmp_path / "api.db", balance=100.0, hit_rate=1.0, failure_rate=0.0, latency="fixed(60)") as api:
        first = workspace.run_job(api, RunOptions(max_time_s=1.0))
        assert first.submitted <= 40 / MAX_PRICE
        api.advance(90)
    with serve_api(tmp_path / "api.db", hit_rate=1.0, failure_rate=0.0, latency="fixed(0)") as api:
        api.inject_fault("error-after", 2)
        second = workspace.run_job(api)
        audit = api.audit()
    assert second.exit_code == 12
    assert "has reached `min_balance`" in str(second.error)
    assert audit["balance"] - audit["credits_reserved"] >= 60
    assert audit["paid_twice"] == 0


def test_min_balance_refused_at_start(tmp_path: Path, workspace: Workspace) -> None:
    """Exits with 5 before anything is sent; a run without new requests works."""
    workspace.write_job(limits="{requests_per_second: 1000, min_balance: 8}")
    workspace.write_leads(make_leads(1))
    with serve_api(tmp_path / "api.db", balance=11.0) as api:
        result = workspace.run_in_process("run", "job.yaml", api=api)
        assert (result.exit_code, api.audit()["accepted"]) == (5, 0)
        assert "`min_balance` is 8" in result.stderr
        assert workspace.run_job(api, RunOptions(limit=0)).exit_code == 0


@pytest.mark.long
def test_tighter_limit_is_reported(tmp_path: Path, workspace: Workspace) -> None:
    """`max_credits` and `min_balance` apply together; the tighter one is reported."""
    workspace.write_leads(make_leads(9))
    with serve_api(tmp_path / "api.db", balance=100.0, hit_rate=1.0) as api:
        for limits, message in (("max_credits: 5, min_balance: 10", "credits cap"), ("min_balance: 94", "min_balance")):
            workspace.write_job(limits=f"{{requests_per_second: 1000, in_flight: 1, {limits}}}")
            summary = workspace.run_job(api)
            assert (summary.exit_code, message in str(summary.error)) == (12, True), summary


def test_cap_below_the_price_of_one_request(api: SandboxApi, workspace: Workspace) -> None:
    """Nothing can be sent: the message names the cap and the price, for a run and for a step."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(limits="{max_credits: 1}")
    summary = workspace.run_job(api)
    assert (summary.exit_code, summary.submitted) == (12, 0)
    assert summary.error == "`max_credits` is 1, and one request may cost 3.51"
    assert str(summary.hint).startswith("raise `max_credits`")

    step = "{name: mail, waterfall: email_getter, limits: {max_credits: 0.5}, params: {first_name: First Name, "
    workspace.write_job(
        "version: 1\ninput: leads.csv\noutput: out.csv\n"
        f"steps: [{step}last_name: Last Name, company: Website}}, columns: {{work_email: email}}}}]\n"
    )
    summary = workspace.run_job(api)
    assert (summary.exit_code, summary.submitted) == (12, 0)
    assert summary.error == "`max_credits` of the step `mail` is 0.5, and one request may cost 3.51"


@pytest.mark.long
def test_unknown_price_with_cap_collects_only(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider without a price rules out `max_credits`: nothing is sent, open tasks are collected."""
    workspace.write_leads(make_leads(2))
    with serve_api(tmp_path / "api.db", latency="fixed(60)", hit_rate=1.0) as api:
        workspace.submit_without_collecting(api)
        api.advance(90)
        workspace.write_job(limits="{requests_per_second: 1000, max_credits: 50}")
        workspace.write_leads(make_leads(4))
        monkeypatch.setattr("enrich.databar.description.Waterfall.highest_price", lambda *_: None)
        summary = workspace.run_job(api)
        second = workspace.run_in_process("run", "job.yaml", api=api)
        assert api.audit()["accepted"] == 2
    assert (summary.exit_code, second.exit_code) == (5, 5)
    assert "has no price" in str(summary.error)
    with closing(workspace.open_ledger()) as ledger:
        assert queries.state_counts(ledger)[State.FOUND] == 2
