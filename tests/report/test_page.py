"""The report page: its content, safe with any name, and its layout in a browser."""

from __future__ import annotations

import io
import itertools
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any, get_args

import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.report import charts
from enrich.report.data import Report
from enrich.report.formatting import DASH, clean_text, fit_text
from enrich.report.formatting import text_width as width_of
from enrich.report.render import render_report
from tests.support import sample_reports as reports
from tests.support.browser import CHROMIUM_PATH, NOT_INSTALLED, Browser, Scheme, open_browser

REPORTS = {
    "full": reports.full_report,
    "nasty": reports.hostile_report,
    "millions": reports.large_report,
    "nothing found": reports.no_match_report,
    "empty": reports.empty_report,
}
WIDTHS = (390, 1024, 1600)
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
    assert set(reports.marked_values(page, "night 9", "credits_spent")) == {171.35}
    assert set(reports.marked_values(page, "night 9", "found")) == {52.0}
    assert set(reports.marked_values(page, "night 4", "balance_after")) == {None}
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
    assert "3 answers of unknown price" in page


@pytest.mark.long
def test_changes_against_previous_run() -> None:
    """The key numbers show their change since the previous run; the first run has none."""
    page = rendered_page(reports.typical_report)
    assert "▼ 13.6 points less" in page
    assert "▲ 1.88 more" in page
    first = render_report(replace(reports.typical_report(), nights=reports.typical_report().nights[:1]))
    assert "night before" not in first


@pytest.mark.long
def test_actions_come_first() -> None:
    """Required actions come before all numbers; without any, the page states it."""
    page = rendered_page(reports.typical_report)
    assert page.index("enrich reconcile jobs/leads.yaml") < page.index("<dl class") < page.index("<svg")
    assert "What needs you" in page
    calm = render_report(replace(reports.typical_report(), needs=(), anomalies=()))
    assert "Nothing needs you" in calm
    assert "What needs you" not in calm


@pytest.mark.long
def test_comparison_section_position() -> None:
    """A comparison comes first on the page; without one there is no such section."""
    page = rendered_page(reports.full_report)
    assert page.index("found 19 more") < page.index('id="waterfall"')
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
    assert "has never run" in page
    assert "<svg" not in page


# The provider staircase


def test_provider_staircase_chart() -> None:
    """Each provider's bar of matches starts where the previous ones end; the rest is leads that were not found."""
    steps = charts.waterfall_steps(reports.typical_report().waterfall)
    assert [step.start for step in steps] == [0, 412, 599, 660, 718, 735]
    assert steps[0].end == 1090 + 74
    assert steps[0].presumed == 74
    assert (steps[-1].name, steps[-1].end - steps[-1].start) == (charts.NO_MATCH_LABEL, 1180 - 735)


@pytest.mark.long
def test_verifiers_not_in_chart() -> None:
    """Verifiers find nothing, so they are in the table and the text but not in the chart."""
    assert "Mailproof" not in [step.name for step in charts.waterfall_steps(reports.typical_report().waterfall)]
    page = rendered_page(reports.typical_report)
    assert "Mailproof (verifier)" in page
    assert "Mailproof verified 752 finds: 37.60 credits." in page


# Names from outside


def test_hostile_names_are_escaped() -> None:
    """No name becomes an element, an attribute or a template, on the page or in a chart."""
    page = rendered_page(reports.hostile_report)
    assert "<script" not in page
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
    assert width_of(fitted, 13) <= room
    assert fitted == name or fitted.endswith("…")


@pytest.mark.long
def test_page_has_no_external_resources() -> None:
    """The page loads and runs nothing: no script, and no URL but SVG's namespace."""
    page = rendered_page(reports.full_report)
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|iframe|img|object|base)\b|\bon\w+=|https?:|url\((?!#)|@import", page)


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
        browser.open(path, width, scheme)
        seen = inspect_layout(browser)
        where = f"{name} at {width} pixels, {scheme}"
        assert browser.console_messages() == [], where
        assert browser.requests() == [path.as_uri()], where
        assert seen["width"] <= width, where
        assert [seen[wrong] for wrong in ("overflowing", "outside", "overlapping", "faint")] == [[]] * 4, where
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
    for number in ("45.2%", "171.35", "6,128.65", "1,236.60", "of it presumed"):
        assert number in text
    browser.send_command("Emulation.setEmulatedMedia", media="print")
    seen = inspect_layout(browser)
    assert seen["dark"] is False
    assert seen["faint"] == []


@pytest.mark.long
@needs_browser
def test_layout_checks_detect_errors(browser: Browser, tmp_path: Path) -> None:
    """The layout checks detect faint text, a word too wide, an external image and a script error."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<body style='margin:0;background:#fff'><p style='color:#ccc'>faint</p>"
        "<div style='width:3000px'>wide</div><img src='gone.png'><script>undefined_name()</script>"
    )
    browser.open(wrong, 390)
    deadline = time.monotonic() + 30
    while not browser.console_messages() and time.monotonic() < deadline:
        browser.evaluate("1")
    seen = inspect_layout(browser)
    assert seen["faint"]
    assert seen["overflowing"]
    assert len(browser.requests()) == 2
    assert browser.console_messages()
