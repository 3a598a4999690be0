"""Whatever a job lives through, all that tell of it say the same: receipts, status, runs, report, metrics, bill."""

from __future__ import annotations

import random
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import CALM, Api, Office, kill, people, serving, until

SAME = ("submitted", "credits_spent", "credits_unknown", "balance_before", "balance_after")
KEYS = (
    {"dispatch": "{bulk: 7}", "dedupe": "false"},
    {"policy": "{refresh: {found: 1s, not_found: 1s}}"},
    {"where": "Note <> 'note 3'", "caps": "{by: company, max: 1}"},
    {"merge": "overwrite", "columns": "{Email: email}", "only_if_empty": "[Email]"},
    {"canary": "{rows: 5, min_hit_rate: 0.5}"},
)
NIGHTS: tuple[list[str], ...] = (
    [],
    ["--limit", "7"],
    ["--sample", "5"],
    ["--max-credits", "9"],
    ["--retry", "failed,expired"],
    ["--limit", "0"],
)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))])
def test_all_tell_the_same(tmp_path: Path, office: Office, seed: int) -> None:
    """Some nights of a job with an odd setting, with leads that come and go, failures, free and charged, and prices."""
    choose = random.Random(seed)
    settings = replace(CALM, failure_rate=0.3, free_failures=0.5, hit_rate=0.6, charge_misses=seed % 2 == 0)
    office.write_job(report="{by: Note}", metrics="job.prom", **KEYS[seed])
    leads = people(30)
    with serving(tmp_path / "api.db", settings) as api:
        for night in range(3):
            at = choose.randrange(len(leads))
            leads[at:at] = [*people(8, 100 * (night + 1)), leads[at], ["", "", "", "", "nobody"]]
            del leads[-3:]
            office.write_leads(leads)
            api.reprice({833: choose.choice([0, 0.004, 3])})
            office.command("run", "job.yaml", *choose.choice(NIGHTS), api=api)
            _agree(office, api)


@pytest.mark.long
def test_all_tell_the_same_of_a_killed_night(tmp_path: Path, office: Office) -> None:
    """What it bought is told by all once the next night has fetched it."""
    office.write_leads(people(40))
    office.write_job(report="{by: Note}", metrics="job.prom")
    with serving(tmp_path / "api.db", replace(CALM, latency="fixed(1)")) as api:
        night = office.start("run", "job.yaml", api=api)
        until(lambda: office.ledger_path.exists() and _submitted(office) == 40)
        kill(night)
        assert office.command("run", "job.yaml", "--retry", "in_doubt", api=api).code == 0
        _agree(office, api)


def _submitted(office: Office) -> int:
    with closing(office.ledger()) as ledger:
        return sum(execution.submitted for execution in ledger.lived("job"))


def _agree(office: Office, api: Api) -> None:
    def told(*arguments: str) -> dict[str, Any]:
        done = office.command(*arguments, "--json", api=api)
        assert done.code == 0, done.stderr
        return done.receipt

    status, runs = told("status", "job.yaml"), told("runs", "job.yaml")
    report, now = told("report", "job.yaml"), told("collect", "job.yaml", "--partial")
    bill, waterfall, nights = api.audit(), report["waterfall"], report["nights"]

    # The money: of the ledger, of the nights, of the waterfall, of the metrics, of the page, and of the API itself.
    for spent in (
        runs["totals"]["credits_spent"],
        report["credits_spent"],
        waterfall["spent"],
        sum(night["credits_spent"] for night in nights),
        sum(each["credits"] for each in waterfall["providers"]) + waterfall["elsewhere"],
        _gauge(office, "enrich_ledger_credits_spent"),
        bill["credits_charged"],
    ):
        assert spent == pytest.approx(status["credits_spent"], abs=1e-6)
    assert runs["totals"]["submitted"] == sum(night["submitted"] for night in nights) == bill["accepted"]
    assert waterfall["found"] == sum(night["found"] for night in nights)

    # Each night: its receipt, and what is told of it afterwards.
    for execution, night in zip(status["executions"], reversed(nights), strict=True):
        assert execution["credits_spent"] == night["credits_spent"]
        receipt = execution["receipt"]
        if receipt is None:
            assert night["outcome"] == "killed"
            continue
        assert {name: receipt[name] for name in SAME} == {name: execution[name] for name in SAME}
        assert receipt["answers"] == sum(night[state] for state in ("found", "not_found", "failed", "expired"))
        assert (receipt["cost_per_hit"] or 0) * night["found"] == pytest.approx(
            receipt["credits_spent"] if night["found"] else 0, abs=1e-4
        )
        if receipt["answers"]:
            earned = sum(each["credits"] for each in receipt["providers"]) + receipt["credits_elsewhere"]
            assert earned == pytest.approx(receipt["credits_spent"], abs=1e-6)
        assert not (receipt["difference"] or {}).get("unexplained")

    # The rows: of the output, and of the page.
    assert report["rows"] == sum(report["statuses"].values()) == len(office.output())
    assert {name: now[name] for name in report["statuses"]} == report["statuses"]
    assert {each["name"]: each["found"] for each in report["columns"]} == now["columns"]
    for groups in report["groups"]:
        assert sum(group["found"] for group in groups["groups"]) == report["statuses"]["found"]


def _gauge(office: Office, name: str) -> float:
    (value,) = re.findall(rf'^{name}{{job="job"}} (.+)$', (office.folder / "job.prom").read_text(), re.MULTILINE)
    return float(value)
