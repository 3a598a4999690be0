"""The report page: its content, safe with any name, and its layout in a browser."""

from __future__ import annotations

import io
import itertools
import re
import time
import xml.etree.ElementTree as ET
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from html import escape, unescape
from pathlib import Path
from typing import Any, get_args

import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.report import bars
from enrich.report.charts import ChartColor
from enrich.report.data import GroupedHits, HitCounts, OutputRows, Report
from enrich.report.formatting import DASH, clean_text, fit_text, text_width
from enrich.report.render import make_sections, render_report, tile_groups, waterfall_figure
from tests.end_to_end.test_document_wording import PATTERN
from tests.support import sample_reports as reports
from tests.support.browser import CHROMIUM_PATH, NOT_INSTALLED, Browser, Scheme, open_browser

REPORTS = {
    "full": reports.full_report,
    "nasty": reports.hostile_report,
    "millions": reports.large_report,
    "nothing found": reports.no_match_report,
    "steps": reports.steps_report,
    "empty": reports.empty_report,
}
WIDTHS = (390, 900, 1400)
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
#: Upper limit of a usual report, in bytes.
MAX_PAGE_BYTES = 400_000


needs_browser = pytest.mark.skipif(CHROMIUM_PATH is None, reason=NOT_INSTALLED)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start one browser for all tests of this file."""
    with open_browser() as opened:
        yield opened


@cache
def rendered_page(make: Callable[[], Report]) -> str:
    """Render a report once for all tests that read it."""
    return render_report(make())


def write_page(folder: Path, make: Callable[[], Report]) -> Path:
    """Write a report to a file."""
    path = folder / "report.html"
    path.write_text(rendered_page(make), encoding="utf-8")
    return path


# Content


@pytest.mark.long
def test_page_is_deterministic() -> None:
    """The same data gives the same bytes, so reports can be compared."""
    assert render_report(reports.full_report()) == rendered_page(reports.full_report)


@pytest.mark.long
def test_page_contains_machine_readable_values() -> None:
    """The page contains the values of `--json` for programs, to the last digit."""
    report = reports.typical_report()
    page = rendered_page(reports.typical_report)
    assert reports.marked_values(page, "job", "credits_spent") == [1236.6]
    assert set(reports.marked_values(page, "run 9", "credits_spent")) == {171.35}
    assert set(reports.marked_values(page, "run 9", "found")) == {52.0}
    assert set(reports.marked_values(page, "run 4", "balance_after")) == {None}
    assert reports.marked_values(page, "waterfall", "answers") == [1180.0]
    for provider in report.waterfall.providers:
        assert reports.marked_values(page, f"provider {provider.name}", "credits") == [provider.credits]
        assert reports.marked_values(page, f"provider {provider.name}", "cost_per_hit") == [provider.cost_per_hit]
    for status, count in report.statuses.items():
        assert reports.marked_values(page, "statuses", status)[:1] == ([float(count)] if count else [])


@pytest.mark.long
def test_unknown_values_are_dashes() -> None:
    """An unknown balance is a dash, and an amount with unknown prices is labeled."""
    page = rendered_page(reports.no_match_report)
    assert re.search(rf'data-name="balance_after">{DASH}<', page)
    assert re.search(rf'data-name="cost_per_hit">{DASH}<', page)
    assert "3 results of unknown price" in page


@pytest.mark.long
def test_tiles_name_their_runs() -> None:
    """Key numbers are of the last run or of all runs; a single run has no numbers of all runs."""
    page = rendered_page(reports.typical_report)
    assert plain_text(page).count("Last run Run 9, 17 Nov 2026") == 1
    assert plain_text(page).count("All runs 9 runs since 9 Nov 2026") == 1
    assert reports.marked_values(page, "all runs", "found") == [735]
    assert reports.marked_values(page, "all runs", "hit_rate") == [735 / 1348]
    first = render_report(replace(reports.typical_report(), runs=reports.typical_report().runs[:1]))
    assert "Last run Run 1, 9 Nov 2026" in plain_text(first)
    assert 'id="all-runs"' not in first


def test_only_rates_are_compared() -> None:
    """Only the match rate and the cost per match show a change, from 100 results on."""
    report = reports.typical_report()
    assert tile_changes(report) == ["▼ 13.6 points vs. run 8", "▲ 1.88 vs. run 8"]
    assert tile_changes(replace(report, runs=report.runs[:1])) == []
    small = replace(report.runs[-2], found=40, not_found=59)
    assert tile_changes(replace(report, runs=[*report.runs[:-2], small, report.runs[-1]])) == [
        "▼ 6.8 points vs. run 7",
        "▲ 1.48 vs. run 7",
    ]
    assert tile_changes(replace(report, runs=[*report.runs[:-1], replace(small, execution=9)])) == []
    same = replace(report.runs[-2], execution=9)
    assert tile_changes(replace(report, runs=[*report.runs[:-1], same])) == ["same as run 8"] * 2


def tile_changes(report: Report) -> list[str]:
    """Return the changes that the tiles show."""
    return [tile.change for group in tile_groups(report) for tile in group.tiles if tile.change]


@pytest.mark.long
def test_few_runs_have_no_trend_charts() -> None:
    """Charts over time need five runs."""
    report = reports.typical_report()
    assert 'id="trends"' in render_report(replace(report, runs=report.runs[:5]))
    assert 'id="trends"' not in render_report(replace(report, runs=report.runs[:4]))


@pytest.mark.long
def test_skipped_rows_by_reason() -> None:
    """The page shows why rows were not sent, by reason, and in a job with steps by step."""
    page = rendered_page(reports.typical_report)
    assert "No request for 101 rows of 1,301. Most frequent reason: left out by where or only_if_empty." in page
    assert reports.marked_values(page, "skipped", "rows") == [60, 29, 12]
    steps = rendered_page(reports.steps_report)
    assert reports.marked_values(steps, "skipped verify", "rows") == [566]


@pytest.mark.long
def test_sandbox_banner() -> None:
    """The report of a sandbox run begins with a banner."""
    assert plain_text(rendered_page(reports.steps_report)).startswith("SANDBOX Results")
    assert "SANDBOX" not in rendered_page(reports.typical_report)


@pytest.mark.long
def test_each_step_is_shown() -> None:
    """Each step has requests, match rate, spend, cost per completed lead and a waterfall; the costs add up."""
    report, page = reports.steps_report(), rendered_page(reports.steps_report)
    names = [each.step for each in report.step_waterfalls]
    assert [reports.marked_values(page, f"step {name}", "answers") for name in names] == [[610], [1180], [735]]
    assert reports.marked_values(page, "step company", "hit_rate") == [248 / 604]
    assert [reports.marked_values(page, f"step {name}", "spent") for name in names] == [[557.0], [1261.6], [7.35]]
    per_lead = [*names, "all steps"]
    costs = [
        reports.marked_values(page, about if about == "all steps" else f"step {about}", "cost_per_lead")[0]
        for about in per_lead
    ]
    assert costs == pytest.approx([cost / 735 for cost in (557.0, 1261.6, 7.35, 1825.95)])
    assert [page.count(f'id="waterfall-{name}"') for name in names] == [1, 1, 1]
    assert reports.marked_values(page, "all runs", "cost_per_lead") == [report.cost_per_lead]


@pytest.mark.long
@pytest.mark.parametrize("name", ["full", "steps", "millions", "nothing found", "empty"])
def test_words_of_the_page(name: str) -> None:
    """No sentence of the page has a word that the documents ban."""
    found = PATTERN.findall(plain_text(rendered_page(REPORTS[name])).replace("running at Databar", ""))
    assert found == []


@pytest.mark.long
def test_one_of_a_kind_is_singular() -> None:
    """A report of one lead has one request and one row. Axis titles are plural."""
    report = reports.no_match_report()
    assert report.waterfall is not None
    one = reports.make_provider("Mailhound", 1, 1, 0.5)
    waterfall = replace(report.waterfall, providers=(one,), answers=1, found=1, failed=0, not_reported=0)
    text = plain_text(render_report(replace(report, rows=1, waterfall=waterfall)))
    assert "1 request, 1 with a match" in text
    assert "1 request · 0.50 credits" in text
    assert re.search(r"\( ?1 row\)", text)


def plain_text(page: str) -> str:
    """Return the words of a page: its text, and that of labels and charts."""
    body = re.sub(r"<(style|script)>.*?</\1>|<code>.*?</code>", "", page.split("<body>")[1], flags=re.DOTALL)
    labels = " ".join(re.findall(r'aria-label="([^"]*)"', body))
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body) + labels).split())


@pytest.mark.long
def test_actions_come_first() -> None:
    """Required actions come before all numbers; without any, the page states it."""
    page = rendered_page(reports.typical_report)
    assert page.index("enrich reconcile jobs/leads.yaml") < page.index("<dl class") < page.index("<svg")
    assert "Action required" in page
    calm = render_report(replace(reports.typical_report(), actions=(), anomalies=()))
    assert "No action required" in calm
    assert "Action required" not in calm


@pytest.mark.long
def test_comparison_section_position() -> None:
    """A comparison comes first on the page; without one there is no such section."""
    page = rendered_page(reports.full_report)
    assert page.index("19 fewer matches") < page.index('id="waterfall"')
    assert set(reports.marked_values(page, "common left", "common_found")) == {238.0}
    assert "compared" not in rendered_page(reports.typical_report)


@pytest.mark.long
def test_rows_only_on_request() -> None:
    """Without `--with-rows` no lead is on the page."""
    assert "ada@northwind.example" in rendered_page(reports.full_report)
    assert "personal data" not in rendered_page(reports.typical_report)


def test_empty_report() -> None:
    """Sections without data are left out, and the page shows why."""
    page = rendered_page(reports.empty_report)
    assert "This job has no runs yet" in page
    assert "enrich run jobs/leads.yaml <span>--limit</span> 10" in page
    assert "<svg" not in page


def test_rows_of_an_input_without_rows() -> None:
    """A file with a header alone has no leads to show: the table is empty."""
    page = render_report(replace(reports.typical_report(), leads=OutputRows(("Email", "enrich_status"), (), 0)))
    assert "<bdi>enrich_status</bdi></th></tr></thead>\n<tbody>\n</tbody>" in page


# The provider staircase


def test_provider_staircase_chart() -> None:
    """Each provider's bar of matches starts where the previous ones end; the rest is leads that were not found."""
    steps = bars.waterfall_steps(reports.typical_report().waterfall)
    assert [step.start for step in steps] == [0, 412, 599, 660, 718, 735]
    assert steps[0].end == 1090 + 74
    assert steps[0].inferred == 74
    assert (steps[-1].name, steps[-1].end - steps[-1].start) == (bars.NO_MATCH_LABEL, 1180 - 735)


def test_failures_have_a_row_of_their_own() -> None:
    """`No match` counts results without a match only. Both counts are in the column of the requests."""
    waterfall = replace(reports.typical_report().waterfall, failed=17)
    *_, no_match, failed = bars.waterfall_steps(waterfall)
    assert (no_match.name, no_match.start, no_match.end) == (bars.NO_MATCH_LABEL, 735, 1163)
    assert (failed.name, failed.start, failed.end) == (bars.FAILED_LABEL, 1163, 1180)
    assert failed.color is ChartColor.FAILED
    column = list(bars.NUMBER_COLUMNS).index("requests")
    assert [bars.step_numbers(step)[column] for step in (no_match, failed)] == ["428", "17"]
    assert bars.step_numbers(failed).count("") == len(bars.NUMBER_COLUMNS) - 1


def test_failures_sent_again_are_named() -> None:
    """The sentence says how many failures were free and sent again."""
    waterfall = replace(reports.typical_report().waterfall, failed=3)
    for retried, text in ((0, "3 of 1,180 requests failed."), (2, "failed, 2 of them free and sent again.")):
        figure = waterfall_figure(replace(waterfall, retried=retried))
        assert figure is not None
        assert text in figure.finding


def test_group_names_in_a_sentence() -> None:
    """A long value is cut, and blank cells have one pair of brackets."""
    hits = [HitCounts("x" * 150, 10, 10, 2), HitCounts("", 10, 10, 5)]
    report = replace(reports.empty_report(), groups=[GroupedHits("Note", hits)])
    (section,) = make_sections(report)
    assert section.figures[0].finding == f"From 20.0% ({'x' * 39}…) to 50.0% (blank)."


@pytest.mark.long
def test_verifiers_not_in_chart() -> None:
    """Verifiers find nothing, so they are in the table and the text but not in the chart."""
    assert "Mailproof" not in [step.name for step in bars.waterfall_steps(reports.typical_report().waterfall)]
    page = rendered_page(reports.typical_report)
    assert "Mailproof (verifier)" in page
    assert "Mailproof verified 752 matches: 37.60 credits." in page


# Names from outside


@pytest.mark.long
def test_hostile_names_are_escaped() -> None:
    """No name becomes an element, an attribute or a template, on the page or in a chart."""
    page = rendered_page(reports.hostile_report)
    assert page.count("<script") == page.count("</script>") == 1
    assert "<img" not in page
    assert page.count("</style>") == 1
    assert page.count("<svg") == page.count("</svg>")
    assert "{{ 7 * 7 }}" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", unescape(page))
    page.encode()


@given(st.text(st.characters(codec=None)))
def test_any_name_can_be_drawn(name: str) -> None:
    """A cleaned name is valid in XML and never empty, either of which would end the process in the chart library."""
    assert clean_text(name)
    ET.fromstring(f"<text>{escape(clean_text(name))}</text>".encode())  # noqa: S314 - made on this line


@given(st.text(min_size=1), st.integers(min_value=20, max_value=300))
def test_long_names_are_shortened(name: str, room: int) -> None:
    """A name too wide for its place ends in an ellipsis; one that fits is kept."""
    fitted = fit_text(name, room, 13)
    assert text_width(fitted, 13) <= room
    assert fitted == name or fitted.endswith("…")


@pytest.mark.long
def test_page_has_no_external_resources() -> None:
    """The page loads nothing, has no URL but SVG's namespace, and runs only the script that its policy names."""
    page = rendered_page(reports.full_report)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    assert unescape(re.findall(r'Policy" content="(.*?)"', page)[0]) == policy
    rest = page.replace(f"<script>{script}</script>", "")
    assert not re.search(r"<(script|link|iframe|img|object|base)\b|\bon\w+=|https?:|url\((?!#)|@import", rest)


# Size


@pytest.mark.long
def test_page_size_limit() -> None:
    """A usual report is small enough for mail; one of a million rows and 400 runs still opens at once."""
    assert len(rendered_page(reports.full_report).encode()) < MAX_PAGE_BYTES
    assert len(rendered_page(reports.large_report).encode()) < 2.5 * MAX_PAGE_BYTES


# In the browser

#: Inspects the open page; returns its elements and its layout errors.
LAYOUT_SCRIPT = Path(__file__).with_name("page_layout.js").read_text(encoding="utf-8")


def inspect_layout(page: Browser) -> dict[str, Any]:
    """Return the layout of the open page."""
    return dict(page.evaluate(LAYOUT_SCRIPT))


@pytest.mark.long
@needs_browser
@pytest.mark.parametrize("name", list(REPORTS))
def test_page_layout(browser: Browser, tmp_path: Path, name: str) -> None:
    """At any width and in both color schemes: no errors, no overflow, readable text, and marks in every chart."""
    path = write_page(tmp_path, REPORTS[name])
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        if scheme == SCHEMES[0]:
            browser.open(path, width, scheme)
        else:
            browser.set_viewport(width, scheme)
        seen = inspect_layout(browser)
        where = f"{name} at {width} pixels, {scheme}"
        assert browser.console_messages() == [], where
        assert browser.requests() == [path.as_uri()], where
        assert seen["width"] <= width, where
        for wrong in ("overflowing", "clipped", "split", "outside", "overlapping", "faint"):
            assert seen[wrong] == [], f"{wrong}: {where}"
        assert all(picture["marks"] and picture["texts"] >= 2 for picture in seen["pictures"]), where
        assert bool(seen["pictures"]) is (name != "empty"), where
        assert seen["smallest"] is None or seen["smallest"] >= 11, where
        assert seen["dark"] is (scheme == "dark"), where
    check_structure(seen)


def check_structure(layout: dict[str, Any]) -> None:
    """Check for one main heading, no skipped level, named tables and charts, and unique ids."""
    levels = layout["headings"]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert layout["nameless"] == []
    assert layout["ids"] == sorted(set(layout["ids"]))
    assert layout["lang"] == "en"


@pytest.mark.long
@needs_browser
def test_page_print_layout(browser: Browser, tmp_path: Path) -> None:
    """In print the page is light, and folded parts are open."""
    browser.open(write_page(tmp_path, reports.full_report), 1024, "dark")
    printed = pypdf.PdfReader(io.BytesIO(browser.pdf()))
    text = " ".join(" ".join(page.extract_text() for page in printed.pages).split())
    assert 3 <= len(printed.pages) <= 12
    for number in ("45.2%", "171.35", "6,128.65", "1,236.60", "Inferred"):
        assert number in text
    browser.send_command("Emulation.setEmulatedMedia", media="print")
    seen = inspect_layout(browser)
    assert seen["dark"] is False
    assert seen["faint"] == []


@pytest.mark.long
@needs_browser
@pytest.mark.parametrize("width", [390, 900])
def test_commands_can_be_copied(browser: Browser, tmp_path: Path, width: int) -> None:
    """A button copies the exact command. Without JavaScript, the command is text that can be selected."""
    command = "enrich run jobs/leads.yaml --retry in_doubt"
    path = write_page(tmp_path, reports.full_report)
    browser.open(path, width)
    button = "document.querySelectorAll('.command button')[1]"
    assert browser.evaluate(f"{button}.click(), getSelection().toString()") == command
    assert browser.evaluate(f"{button}.textContent") in {"Copied", "Press Ctrl+C"}
    browser.send_command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(path, width)
        assert browser.evaluate("document.querySelectorAll('button').length") == 0
        code = "document.querySelectorAll('.command code')[1]"
        assert browser.evaluate(f"getComputedStyle({code}).userSelect") != "none"
        assert browser.evaluate(f"getSelection().selectAllChildren({code}), getSelection().toString()") == command
    finally:
        browser.send_command("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.long
@needs_browser
def test_layout_checks_detect_errors(browser: Browser, tmp_path: Path) -> None:
    """The layout checks detect faint text, a word too wide, an external image and a script error."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<body style='margin:0;background:#fff'><p style='color:#ccc'>faint</p>"
        "<div style='width:3000px'>wide</div><img src='gone.png'><script>undefined_name()</script>"
        "<p style='width:80px;overflow:hidden;white-space:nowrap'>too long for its place</p>"
    )
    browser.open(wrong, 390)
    deadline = time.monotonic() + 30
    while not browser.console_messages() and time.monotonic() < deadline:
        browser.evaluate("1")
    seen = inspect_layout(browser)
    assert seen["faint"]
    assert seen["overflowing"]
    assert seen["clipped"] == ["P too long for its place"]
    assert len(browser.requests()) == 2
    assert browser.console_messages()
