"""A full report of an invented job for the tests of the page, reports at the extremes, and a page that is not drawn."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from enrich.exit_codes import RequiredAction
from enrich.report.data import (
    Anomaly,
    AnswerAge,
    ComparedSide,
    Comparison,
    GroupedHits,
    HistogramBar,
    HitCounts,
    LatencyHistogram,
    OutputRows,
    Report,
    ReportedProvider,
    ReportedRun,
    ReportedWaterfall,
    SkippedRows,
    Traffic,
)
from tests.support.workspace import Workspace

FIRST_RUN_AT = datetime(2026, 11, 9, 2, tzinfo=UTC)


def make_provider(name: str, reported: int, found: int, spent: float, inferred: int = 0) -> ReportedProvider:
    """Make a provider that passes on the leads it does not find."""
    return ReportedProvider(
        name=name,
        verifies=False,
        reported=reported,
        inferred=inferred,
        found=found,
        rejected=found // 40,
        passed_on=reported + inferred - found,
        credits=spent,
        cost_per_hit=round(spent / found, 6) if found else None,
    )


def make_verifier(name: str, reported: int, spent: float) -> ReportedProvider:
    """Make a verifier."""
    return replace(make_provider(name, reported, 0, spent), verifies=True, passed_on=0)


def run_totals(number: int, found: int, not_found: int, spent: float, **more: object) -> ReportedRun:
    """Make the totals of a run; run numbers are days."""
    start = FIRST_RUN_AT + timedelta(days=number - 1)
    values: dict[str, object] = {
        "execution": number,
        "started_at": start.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ended_at": (start + timedelta(minutes=47)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "exit_code": 0,
        "outcome": "ok",
        "rows": 1204,
        "submitted": found + not_found + 2,
        "found": found,
        "not_found": not_found,
        "failed": 2,
        "expired": 0,
        "credits_spent": spent,
        "credits_unknown": 0,
        "balance_before": 9000 - 300.0 * number,
        "balance_after": round(9000 - 300.0 * number - spent, 2),
        "unexplained": 0.0,
        "polls": 5210,
        "rate_limited": 12,
        "elapsed_s": 2843.2,
        **more,
    }
    return ReportedRun(**values)  # type: ignore[arg-type]


def typical_report() -> Report:
    """Make the report of a usual job in its second week."""
    providers = (
        make_provider("Mailhound", 1090, 412, 412.0, 74),
        make_provider("Peoplegrid", 610, 187, 374.0, 133),
        make_provider("Profilewell", 438, 61, 183.0, 118),
        make_provider("Inboxly", 371, 58, 145.0, 124),
        make_provider("Apex Contacts", 313, 17, 85.0, 124),
        make_verifier("Mailproof", 752, 37.6),
    )
    runs = [
        run_totals(1, 201, 160, 312.4),
        run_totals(2, 88, 64, 131.0),
        run_totals(3, 74, 70, 120.5),
        run_totals(4, 0, 12, 0.0, outcome="credits used up", exit_code=12, balance_before=None, balance_after=None),
        run_totals(5, 92, 66, 141.75),
        run_totals(6, 81, 58, 121.0),
        run_totals(7, 77, 71, 139.4),
        run_totals(8, 70, 49, 99.2),
        run_totals(9, 52, 63, 171.35, outcome="unconfirmed", exit_code=14, ended_at=None, credits_unknown=3),
    ]
    return Report(
        job="leads",
        sandbox=False,
        made_at="2026-11-17T07:12:09Z",
        ledger="jobs/.enrich/leads.db",
        input="sample_data/leads.csv",
        output="out/leads_enriched.csv",
        waterfall=ReportedWaterfall("email_getter", providers, 1180, 735, 16, 1261.6, 24.999),
        runs=runs,
        rows=1301,
        statuses={
            "found": 735,
            "not_found": 428,
            "failed": 11,
            "expired": 0,
            "in_doubt": 3,
            "invalid": 41,
            "filtered": 60,
            "pending": 23,
        },
        requests={"found": 735, "not_found": 428, "failed": 11, "in_doubt": 3, "pending": 23},
        credits_spent=1236.6,
        credits_unknown=3,
        planned={"min": 96.0, "likely": 142.5, "max": 310.0},
        columns=[
            HitCounts("work_email", 1301, 1163, 735),
            HitCounts("email_status", 1301, 1163, 731),
            HitCounts("mobile_phone", 1301, 1163, 204),
        ],
        groups=[
            GroupedHits(
                "Country",
                [
                    HitCounts("DE", 402, 371, 271),
                    HitCounts("US", 390, 344, 240),
                    HitCounts("France", 188, 171, 95),
                    HitCounts("United Kingdom of Great Britain", 120, 104, 61),
                    HitCounts("日本", 80, 72, 21),
                    HitCounts("", 64, 51, 20),
                    HitCounts("others", 57, 50, 27),
                ],
                9,
            )
        ],
        latencies=LatencyHistogram(
            [
                HistogramBar(4.0 * place, 4.0 * place + 4, tasks)
                for place, tasks in enumerate([21, 190, 310, 222, 140, 96, 70, 44, 31, 19, 12, 8, 5, 3, 0, 1])
            ],
            1172,
            12.6,
            31.0,
            63.2,
        ),
        traffic=Traffic(
            9,
            60.0,
            [0, 22, 31, 30, 18, 24, 8, 4, 2, 0, 0, 0],
            [0, 4, 20, 28, 22, 21, 14, 9, 6, 3, 1, 1],
            [0, 40, 92, 110, 84, 90, 60, 40, 31, 20, 9, 4],
            [0, 0, 5, 0, 2, 4, 0, 0, 0, 0, 0, 1],
        ),
        ages=[
            AnswerAge("under a day", 52, 63),
            AnswerAge("1 to 7 days", 394, 237),
            AnswerAge("7 to 30 days", 289, 128),
            AnswerAge("over 30 days", 0, 0),
        ],
        anomalies=[
            Anomaly("hit_rate", "The match rate fell from 57.0% of 700 to 45.2% of 115 results."),
            Anomaly("cost_per_hit", "A match cost 3.30 credits, 1.57 before (+110%)."),
        ],
        actions=[
            RequiredAction(
                "3 requests are unconfirmed: they may have been charged. Compare the balance, then decide",
                ("enrich reconcile jobs/leads.yaml", "enrich run jobs/leads.yaml --retry in_doubt"),
            ),
            RequiredAction("41 rows skipped: missing or unusable input. out/rejects.csv has the reasons", ()),
        ],
        notes=["Prices of Peoplegrid changed on 12 Nov: 2.00 credits, was 1.50."],
        skipped=[
            SkippedRows("", "filtered", "left out by where or only_if_empty", 60),
            SkippedRows("", "invalid", "company blank (Website, Email, Company)", 29),
            SkippedRows("", "invalid", "last_name blank (Last Name)", 12),
        ],
        job_file="jobs/leads.yaml",
    )


def steps_report() -> Report:
    """Make the report of the first sandbox run of a job with steps."""
    typical = typical_report()
    providers = typical.waterfall.providers
    steps = (
        ReportedWaterfall("company_lookup", providers[1:3], 610, 248, 4, 557.0, 0.0, step="company", failed=6),
        ReportedWaterfall("email_getter", providers, 1180, 735, 16, 1261.6, 24.999, step="email", failed=17),
        ReportedWaterfall("10", providers[5:], 735, 700, 0, 7.35, 0.0, "enrichment", "verify"),
    )
    return replace(
        typical,
        job="full_contact",
        sandbox=True,
        step_waterfalls=steps,
        runs=typical.runs[:1],
        credits_unknown=0,
        skipped=[
            SkippedRows("email", "filtered", "left out by where or only_if_empty", 690),
            SkippedRows("verify", "filtered", "email blank (work_email): no match in an earlier step", 566),
            SkippedRows("company", "invalid", "company_website blank (Website)", 41),
        ],
    )


def with_comparison(report: Report) -> Report:
    """Add a comparison with another order of providers."""
    left = ComparedSide("jobs/leads.yaml", ["Mailhound", "Peoplegrid", "Profilewell"], 1180, 735, 428, 1261.6, 1.7165)
    right = ComparedSide("jobs/cheap-first.yaml", ["Profilewell", "Peoplegrid"], 410, 231, 170, 371.0, 1.606)
    return replace(
        report,
        comparison=Comparison(
            left,
            right,
            report.waterfall.providers,
            [make_provider("Profilewell", 410, 120, 240.0), make_provider("Peoplegrid", 290, 111, 131.0)],
            common=398,
            both=201,
            only_left=37,
            only_right=18,
            neither=142,
            common_left_credits=421.5,
            common_right_credits=352.25,
            verdict="`jobs/cheap-first.yaml` has 19 fewer matches for the 398 leads of both sides "
            "(18 only there, 37 only here: unlikely to be chance, p = 0.014) at 0.16 credits less per match.",
        ),
    )


def with_rows(report: Report) -> Report:
    """Add rows, as `--with-rows` does."""
    cells = [("Ada", "Example", "northwind.example", "ada@northwind.example", "found", "Mailhound")] * 3
    return replace(
        report,
        leads=OutputRows(("First Name", "Last Name", "Website", "work_email", "enrich_status", "by"), cells, 1298),
    )


def empty_report() -> Report:
    """Make the report of a job that has never run."""
    typical = typical_report()
    return Report(
        job=typical.job,
        sandbox=False,
        made_at=typical.made_at,
        ledger=typical.ledger,
        input=typical.input,
        output=typical.output,
        waterfall=ReportedWaterfall("email_getter", (), 0, 0, 0, 0.0, 0.0),
        requests={},
        actions=[RequiredAction("Start with ten requests", ("enrich run jobs/leads.yaml --limit 10",))],
        job_file=typical.job_file,
    )


def full_report() -> Report:
    """Make a report with everything that a page can show."""
    return with_rows(with_comparison(typical_report()))


#: Hostile text in place of names from outside.
HOSTILE_TEXTS = (
    "<script>alert(1)</script>",
    "</style></svg><img src=x onerror=alert(1)>",
    "W" * 300,
    "\N{RIGHT-TO-LEFT OVERRIDE}שלום עולם مرحبا",
    "\N{PILE OF POO}\N{FAMILY}" * 30,
    "",
    "a\x00b\x1b[31m\ud800\u2028c\ufffe",
    'fill="#fe0004" {{ 7 * 7 }} &amp; %s',
)


def hostile_report() -> Report:
    """Make a report in which every text from outside is hostile."""
    report = full_report()
    first = HOSTILE_TEXTS[1]
    providers = [make_provider(name, 1000 - 100 * place, 90, 90.0) for place, name in enumerate(HOSTILE_TEXTS)]
    hits = [HitCounts(name, 900, 800, 100 * place) for place, name in enumerate(HOSTILE_TEXTS)]
    side = (
        replace(report.comparison.left, label=HOSTILE_TEXTS[2], providers=HOSTILE_TEXTS) if report.comparison else None
    )
    return replace(
        report,
        job=HOSTILE_TEXTS[0] + HOSTILE_TEXTS[2],
        ledger=HOSTILE_TEXTS[2],
        input=first,
        output=HOSTILE_TEXTS[3],
        waterfall=ReportedWaterfall(
            HOSTILE_TEXTS[2], [*providers, make_verifier(first, 12, 1.0)], 1100, 720, 0, 721.0, 0.0
        ),
        runs=[replace(each, outcome=first) for each in report.runs],
        statuses={**report.statuses, HOSTILE_TEXTS[2]: 4, first: 2},
        columns=hits,
        groups=[GroupedHits(name, hits) for name in HOSTILE_TEXTS[:3]],
        ages=[AnswerAge(name, 3, 4) for name in HOSTILE_TEXTS],
        anomalies=[Anomaly(name, name) for name in HOSTILE_TEXTS],
        actions=[RequiredAction(name, (name,)) for name in HOSTILE_TEXTS],
        notes=HOSTILE_TEXTS,
        skipped=[SkippedRows(name, name, name, 1) for name in HOSTILE_TEXTS],
        job_file=HOSTILE_TEXTS[2],
        comparison=replace(report.comparison, left=side, right=side, verdict=HOSTILE_TEXTS[2])
        if report.comparison and side
        else None,
        leads=OutputRows(HOSTILE_TEXTS, [HOSTILE_TEXTS] * 5, 0),
    )


def large_report() -> Report:
    """Make a report of a million rows, a dozen providers, sixty groups and four hundred runs."""
    providers = [
        make_provider(f"Provider of data number {place}", 1_000_000 - 75_000 * place, 70_000, 140_000.5, 4_000)
        for place in range(12)
    ]
    runs = [run_totals(number, 3000 + number * 7 % 900, 2000, 6000.25, rows=1_000_000) for number in range(1, 401)]
    return replace(
        typical_report(),
        waterfall=ReportedWaterfall("email_getter", providers, 1_000_000, 840_000, 0, 1_680_006.0, 0.0),
        runs=runs,
        rows=1_000_000,
        statuses={"found": 840_000, "not_found": 159_999, "in_doubt": 1},
        groups=[GroupedHits("Country", [HitCounts(f"Country {place}", 9000, 8000, 90 * place) for place in range(60)])],
        latencies=LatencyHistogram(
            [HistogramBar(place * 600.0, place * 600.0 + 600, 90_000) for place in range(40)], 1, 60, 61, 9e4
        ),
        traffic=Traffic(400, 10.0, [500] * 4000, [490] * 4000, [900] * 4000, [0, 1] * 2000),
    )


def no_match_report() -> Report:
    """Make the report of a first run without matches, with a single provider."""
    return replace(
        typical_report(),
        waterfall=ReportedWaterfall("email_getter", [make_provider("Mailhound", 12, 0, 0.0)], 12, 0, 0, 0.0, 0.0),
        runs=[run_totals(1, 0, 12, 0.0, balance_before=None, balance_after=None, polls=None, elapsed_s=None)],
        statuses={"not_found": 12},
        columns=[HitCounts("work_email", 12, 12, 0)],
        groups=[GroupedHits("Country", [HitCounts("DE", 12, 0, 0)])],
        planned={"min": None, "likely": None, "max": None},
        traffic=Traffic(1, 5.0, [], [], [], []),
        latencies=LatencyHistogram([HistogramBar(0.0, 0.5, 12)], 12, 0.2, 0.4, 0.5),
        ages=[],
        anomalies=[],
        actions=[],
        skipped=(),
    )


def fake_renderer(
    page: str = "<html>drawn</html>", error: BaseException | None = None
) -> AbstractContextManager[object]:
    """Return this page or raise this error for any report: drawing a page takes a second of processor time."""
    return patch("enrich.report.render.render_report", return_value=page, side_effect=error)


def marked_values(page: str, about: str, name: str) -> list[float | None]:
    """Return the numbers of a page that have these marks."""
    parts = re.findall(rf'data-of="{re.escape(escape(about))}"(.*?)(?=data-of=|</table>|$)', page, re.DOTALL)
    values = [re.findall(rf'data-name="{name}"(?: data-value="([^"]*)")?', part) for part in parts]
    return [float(value) if value else None for found in values for value in found]


def report_json(workspace: Workspace, *arguments: str, job: str = "job.yaml") -> dict[str, Any]:
    """Return the report's data as `--json` prints it."""
    result = workspace.run_in_process("report", job, "--json", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.json_output
