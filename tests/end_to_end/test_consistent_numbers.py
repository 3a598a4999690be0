"""All numbers about a job agree: summaries, status, runs, report, metrics, bill."""

from __future__ import annotations

import random
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enrich.ledger import records
from tests.support.sample_reports import fake_renderer
from tests.support.workspace import INSTANT_API, SandboxApi, Workspace, kill_process, make_leads, serve_api, wait_until

SHARED_NUMBERS = ("submitted", "credits_spent", "credits_unknown", "balance_before", "balance_after")
JOB_VARIANTS = (
    {"dispatch": "{bulk: 7}", "dedupe": "false"},
    {"policy": "{refresh: {found: 1s, not_found: 1s}}"},
    {"where": "Note <> 'note 3'", "caps": "{by: company, max: 1}"},
    {"merge": "overwrite", "columns": "{Email: email}", "only_if_empty": "[Email]"},
    {"canary": "{rows: 5, min_hit_rate: 0.5}"},
)
RUN_OPTIONS: tuple[list[str], ...] = (
    [],
    ["--limit", "7"],
    ["--sample", "5"],
    ["--max-credits", "9"],
    ["--retry", "failed,expired"],
    ["--limit", "0"],
)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_numbers_agree_over_runs(tmp_path: Path, workspace: Workspace, seed: int) -> None:
    """Numbers agree over several runs with unusual settings, changing leads, free and charged failures, and prices."""
    choose = random.Random(seed)
    settings = replace(INSTANT_API, failure_rate=0.3, free_failures=0.5, hit_rate=0.6, charge_misses=seed % 2 == 0)
    workspace.write_job(report="{by: Note}", metrics="job.prom", **JOB_VARIANTS[seed])
    leads = make_leads(30)
    with serve_api(tmp_path / "api.db", settings) as api:
        for run_number in range(3):
            at = choose.randrange(len(leads))
            leads[at:at] = [*make_leads(8, 100 * (run_number + 1)), leads[at], ["", "", "", "", "nobody"]]
            del leads[-3:]
            workspace.write_leads(leads)
            api.set_prices({833: choose.choice([0, 0.004, 3])})
            with fake_renderer():
                workspace.run_in_process("run", "job.yaml", *choose.choice(RUN_OPTIONS), api=api)
            _assert_numbers_agree(workspace, api)


@pytest.mark.long
def test_numbers_agree_after_kill(tmp_path: Path, workspace: Workspace) -> None:
    """Numbers include what a killed run bought, once the next run has collected it."""
    workspace.write_leads(make_leads(40))
    workspace.write_job(report="{by: Note}", metrics="job.prom")
    with serve_api(tmp_path / "api.db", replace(INSTANT_API, latency="fixed(1)")) as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        wait_until(lambda: workspace.ledger_path.exists() and _submitted_count(workspace) == 40)
        kill_process(process)
        assert workspace.run_in_process("run", "job.yaml", "--retry", "in_doubt", api=api).exit_code == 0
        _assert_numbers_agree(workspace, api)


def _submitted_count(workspace: Workspace) -> int:
    with closing(workspace.open_ledger()) as ledger:
        return sum(execution.submitted for execution in records.list_executions(ledger, "job"))


def _assert_numbers_agree(workspace: Workspace, api: SandboxApi) -> None:
    def json_output(*arguments: str) -> dict[str, Any]:
        result = workspace.run_in_process(*arguments, "--json", api=api)
        assert result.exit_code == 0, result.stderr
        return result.json_output

    status, runs = json_output("status", "job.yaml"), json_output("runs", "job.yaml")
    report, now = json_output("report", "job.yaml"), json_output("collect", "job.yaml", "--partial")
    audit, waterfall, report_runs = api.audit(), report["waterfall"], report["nights"]

    # The credits: of the ledger, the runs, the waterfall, the metrics, the page, and the API.
    for spent in (
        runs["totals"]["credits_spent"],
        report["credits_spent"],
        waterfall["spent"],
        sum(run["credits_spent"] for run in report_runs),
        sum(each["credits"] for each in waterfall["providers"]) + waterfall["elsewhere"],
        _gauge(workspace, "enrich_ledger_credits_spent"),
        audit["credits_charged"],
    ):
        assert spent == pytest.approx(status["credits_spent"], abs=1e-6)
    assert runs["totals"]["submitted"] == sum(run["submitted"] for run in report_runs) == audit["accepted"]
    assert waterfall["found"] == sum(run["found"] for run in report_runs)

    # Each run: its summary, and what other commands show of it.
    for execution, report_run in zip(status["executions"], reversed(report_runs), strict=True):
        assert execution["credits_spent"] == report_run["credits_spent"]
        summary = execution["receipt"]
        if summary is None:
            assert report_run["outcome"] == "killed"
            continue
        assert {name: summary[name] for name in SHARED_NUMBERS} == {name: execution[name] for name in SHARED_NUMBERS}
        assert summary["answers"] == sum(report_run[state] for state in ("found", "not_found", "failed", "expired"))
        assert (summary["cost_per_hit"] or 0) * report_run["found"] == pytest.approx(
            summary["credits_spent"] if report_run["found"] else 0, abs=1e-4
        )
        if summary["answers"]:
            stats = sum(each["credits"] for each in summary["providers"]) + summary["credits_elsewhere"]
            assert stats == pytest.approx(summary["credits_spent"], abs=1e-6)
        assert not (summary["difference"] or {}).get("unexplained")

    # The rows: of the output, and of the page.
    assert report["rows"] == sum(report["statuses"].values()) == len(workspace.read_output())
    assert {name: now[name] for name in report["statuses"]} == report["statuses"]
    assert {each["name"]: each["found"] for each in report["columns"]} == now["columns"]
    for groups in report["groups"]:
        assert sum(group["found"] for group in groups["groups"]) == report["statuses"]["found"]


def _gauge(workspace: Workspace, name: str) -> float:
    (value,) = re.findall(rf'^{name}{{job="job"}} (.+)$', (workspace.folder / "job.prom").read_text(), re.MULTILINE)
    return float(value)
