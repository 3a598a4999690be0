"""The run summary as text: aligned, explicit about unknown values, and within 80 columns."""

from __future__ import annotations

import os
import unicodedata
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from enrich.exit_codes import ExitCode, JobArguments, format_actions, required_actions
from enrich.models import RowStatus
from enrich.run.balance import explain_balance
from enrich.run.finish import read_provider_totals
from enrich.run.signals import SignalHandler
from enrich.run.summary import RunSummary, format_details, format_summary
from tests.support.cases import in_turn
from tests.support.workspace import SHORT_TIMEOUTS, SandboxApi, Workspace, make_leads, read_terminal, serve_api

TARGET = JobArguments("job.yaml", "job.yaml")
#: A step without failures, as in the JSON of a run summary.
STEP = {"failed": 0, "expired": 0}
NUMBERS = st.integers(0, 5_000_000)
CREDITS = st.floats(0, 5_000_000).map(lambda value: round(value, 6))


def make_provider(name: str, **known: Any) -> dict[str, Any]:
    """Return a provider of a run summary."""
    nothing = {"verifies": False, "asked": 0, "presumed": 0, "found": 0, "rejected": 0, "credits": 0.0}
    return {"name": name, **nothing, "cost_per_hit": None, **known}


def terminal_width(text: str) -> int:
    """Return a text's width in terminal columns."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.category(letter) in {"Mn", "Me"} for letter in text)


@pytest.mark.long
@given(st.data())
def test_line_width(data: st.DataObject) -> None:
    """Any numbers and names fit in 80 columns, without control characters and trailing spaces."""
    names = st.text(min_size=1, max_size=60)
    summary = RunSummary(
        job=data.draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)),
        exit_code=0,
        execution=data.draw(st.integers(1, 99_999)),
        rows=data.draw(NUMBERS),
        requests=data.draw(NUMBERS),
        submitted=data.draw(NUMBERS),
        reused=data.draw(NUMBERS),
        answers=data.draw(NUMBERS),
        credits_spent=data.draw(CREDITS),
        credits_unknown=data.draw(st.integers(0, 99)),
        cost_per_hit=data.draw(st.none() | st.floats(0, 999)),
        planned=data.draw(
            st.none() | st.fixed_dictionaries({"min": CREDITS, "likely": st.none() | CREDITS, "max": CREDITS})
        ),
        balance_before=data.draw(CREDITS),
        balance_after=data.draw(CREDITS),
        polls=data.draw(NUMBERS),
        rate_limited=data.draw(st.integers(0, 9_999)),
        elapsed_s=data.draw(st.floats(0, 90_000)),
        providers=[
            make_provider(name, asked=data.draw(NUMBERS), found=data.draw(NUMBERS), credits=data.draw(CREDITS))
            for name in data.draw(st.lists(names, max_size=4))
        ],
        providers_not_reported=data.draw(NUMBERS),
        credits_unattributed=data.draw(CREDITS),
    ).with_row_counts(
        {status: data.draw(NUMBERS) for status in RowStatus},
        {name: data.draw(NUMBERS) for name in data.draw(st.lists(names, unique=True, max_size=4))},
    )

    for line in [*format_summary(summary), *format_details(summary)]:
        assert terminal_width(line) <= 80
        assert line == line.rstrip()
        assert line.isprintable()


def test_columns_are_aligned_in_any_script() -> None:
    """Columns are aligned in any script: ideographs and emoji are two columns wide, combining accents none."""
    names = [
        "plain",
        "メールアドレス" * 3,
        "電話",
        "📧",
        "Zoe\N{COMBINING DIAERESIS}",
        "e" + "\N{COMBINING ACUTE ACCENT}" * 999,
    ]
    summary = RunSummary(
        "leads",
        0,
        rows=9,
        providers=[make_provider(name, asked=7, found=5) for name in names],
        providers_not_reported=1,
    ).with_row_counts({RowStatus.FOUND: 2, RowStatus.NOT_FOUND: 7}, dict.fromkeys(names, 5))

    for share in ("55.6%", "71.4%"):
        before = [terminal_width(line[: line.index(share)]) for line in format_details(summary) if share in line]
        assert before == [before[0]] * len(names)


def test_small_amounts() -> None:
    """Amounts below a hundredth of a credit keep their digits, and zero has no sign."""
    summary = RunSummary(
        "leads",
        0,
        execution=1,
        rows=1,
        found=1,
        submitted=1,
        credits_spent=0.004,
        cost_per_hit=0.000012,
        providers=[make_provider("Inboxly", asked=1, credits=0.0)],
        credits_unattributed=-0.0000001,
        providers_not_reported=1,
    )
    result = "\n".join([*format_summary(summary), *format_details(summary)])
    assert " 0.004 credits" in result
    assert " 0.000012 per match" in result
    assert "-0.00" not in result
    assert "1 result without providers: not reported by the API" in result


def test_unknown_values_are_omitted() -> None:
    """Unknown values are omitted: no price without matches, and no plan or balance without a value."""
    summary = RunSummary("job", 0, rows=1, polls=3).with_row_counts({RowStatus.PENDING: 1}, {"a": 0})
    words = [word for line in [*format_summary(summary), *format_details(summary)] for word in line.split()]

    assert "balance" not in words
    assert "match" not in words
    assert "planned" not in words
    assert "a" not in words  # without answers nothing is known about a column


def test_unknown_prices_are_counted() -> None:
    """Answers of unknown price are counted, because the credits spent are then a minimum."""
    summary = RunSummary(
        "job",
        0,
        execution=1,
        rows=2,
        found=2,
        submitted=2,
        credits_spent=1.5,
        credits_unknown=2,
        planned={"min": 0, "likely": 3, "max": None},
    )

    text = "\n".join([*format_summary(summary), *format_details(summary)])
    assert "  at least 1.50 credits  " in text
    assert "  2 results of unknown price\n" in text
    assert "planned 3.00, at an unknown price" in text


def test_balance_difference() -> None:
    """A balance that differs from the spending is explained in parts, the last of them unexplained."""
    summary = RunSummary("job", 0, rows=2, credits_spent=3, balance_before=10, balance_after=2)
    movements = [("known", True, 2, 3_000_000, 0), ("in_doubt", True, 1, 0, 2_000_000)]
    difference = explain_balance(1, 10_000_000, 2_000_000, movements)

    text = "\n".join(format_details(replace(summary, difference=difference.as_json())))

    assert "3.00         2 results of known price" in text
    assert "2.00         1 unconfirmed request, or 0.00" in text
    assert "3.00         missing, not explained: enrich reconcile JOB" in text
    assert "known price" not in "\n".join(format_details(replace(summary, balance_after=7)))


def test_short_summary() -> None:
    """Leads the screen with matches, spend and output: the lines that a reader needs after each run."""
    summary = RunSummary(
        "leads",
        10,
        execution=1,
        rows=263,
        submitted=241,
        skipped={"company blank": 20},
        credits_spent=81.95,
        cost_per_hit=0.479,
        elapsed_s=14.2,
        output="out/leads_enriched.csv",
        rejects="out/rejects.csv",
        rejected=21,
    ).with_row_counts({RowStatus.FOUND: 171, RowStatus.NOT_FOUND: 71, RowStatus.INVALID: 20, RowStatus.FAILED: 1}, {})

    assert format_summary(summary) == [
        "✓ 171 of 263 leads enriched (65%)  81.95 credits  0.48 per match  14 s",
        "  71 no match · 20 skipped (company blank) · 1 failed",
        "  → out/leads_enriched.csv",
        "  → out/rejects.csv (21 rejected leads)",
    ]


@in_turn(
    ("summary", "lines"),
    [
        (
            RunSummary("leads", 0, execution=2, rows=9, found=5, not_found=4, reused=9, elapsed_s=0.31, output="o.csv"),
            ["✓ 5 of 9 leads enriched (56%)  nothing sent  0.3 s", "  4 no match", "  → o.csv"],
        ),
        (
            RunSummary("leads", 0, execution=1, rows=0, found=0, elapsed_s=3, output="o.csv", sandbox=True),
            ["✓ SANDBOX the input has no leads  nothing sent  3.0 s", "  → o.csv"],
        ),
        (
            RunSummary("leads", 14, execution=1, rows=2, found=0, in_doubt=2, unconfirmed=2, output="o.csv"),
            ["! 0 of 2 leads enriched (0%)  at least 0.00 credits  0.0 s", "  2 unconfirmed", "  → o.csv"],
        ),
        (
            RunSummary("leads", 12, execution=1, rows=9, found=1, pending=8, submitted=1, output="o.csv"),
            ["! 1 of 9 leads enriched (11%)  0.00 credits  0.0 s", "  8 pending", "  → o.csv"],
        ),
        (
            RunSummary("leads", 143, execution=1, rows=9, answers=2, submitted=4, credits_spent=2, elapsed_s=200),
            [
                "! stopped after 2 results  2.00 credits  3 min 20 s",
                "  No output written. An earlier output file is unchanged.",
            ],
        ),
        (
            RunSummary("leads", 14, execution=1, rows=3, found=2, in_doubt=1, submitted=3, output="o.csv"),
            ["! 2 of 3 leads enriched (67%)  0.00 credits  0.0 s", "  1 unconfirmed", "  → o.csv"],
        ),
    ],
)
def test_short_summary_of_other_ends(summary: RunSummary, lines: list[str]) -> None:
    """Runs without new requests, and runs that stopped early, have the same lines."""
    assert format_summary(summary) == lines


def test_reasons_for_skipped_rows() -> None:
    """Names the most frequent reasons, and the word `blank` once."""
    skipped = {"company blank": 58, "last_name blank": 9, "first_name blank": 4, "company: free mail": 2, "x: y": 1}
    summary = RunSummary("leads", 0, rows=80, skipped=skipped, invalid=74, found=0, output="o.csv")

    assert "  74 skipped (company blank 58, last_name 9, first_name 4, other 3)" in format_summary(summary)


@in_turn(
    ("code", "rows", "commands"),
    [
        (0, {}, []),
        (10, {"failed": 2}, ["enrich run job.yaml --retry failed"]),
        (10, {"expired": 1}, ["enrich run job.yaml --retry expired"]),
        (10, {"failed": 0, "expired": 0, "found": 2}, ["enrich run job.yaml --retry failed,expired"]),
        (10, {"failed": 0, "expired": 0, "steps": [STEP, STEP]}, ["enrich run job.yaml --retry failed,expired"]),
        (10, {"failed": 0, "steps": [STEP, STEP | {"failed": 1}]}, ["enrich run job.yaml --retry failed"]),
        (0, {"failed": 1, "invalid": 3, "not_found": 4}, ["enrich run job.yaml --retry failed"]),
        (12, {"pending": 5}, ["enrich run job.yaml"]),
        (13, {"pending": 5}, []),
        (
            14,
            {"in_doubt": 1},
            [
                "enrich reconcile job.yaml",
                "enrich run job.yaml --retry in_doubt",
                "enrich run job.yaml --accept in_doubt",
            ],
        ),
    ],
)
def test_commands_for_required_actions(code: int, rows: dict[str, Any], commands: list[str]) -> None:
    """Each required action has its command once, ready to paste."""
    needed = required_actions(code, rows, TARGET)

    assert [command for need in needed for command in need.commands] == commands
    shown = [line[line.index("enrich ") :] for line in format_actions(needed) if "enrich " in line]
    assert shown == commands


@pytest.mark.long
def test_summary_matches_bill(tmp_path: Path, workspace: Workspace) -> None:
    """Providers, unattributed credits and columns add up to what the API charged and answered."""
    workspace.write_leads(make_leads(80))
    workspace.write_job(email_verifier="10")
    with serve_api(tmp_path / "api.db", miss_kinds=("null", "blank_result"), failure_rate=0.1) as api:
        summary = workspace.run_job(api)
        audit = api.audit()

    by_provider = sum(each["credits"] for each in summary.providers)
    assert summary.credits_spent == pytest.approx(audit["credits_charged"])
    assert by_provider + (summary.credits_unattributed or 0) == pytest.approx(summary.credits_spent)
    assert sum(each["found"] for each in summary.providers) == summary.found
    assert summary.columns == {"work_email": summary.found}
    assert summary.cost_per_hit == pytest.approx(summary.credits_spent / (summary.found or 0), abs=1e-6)
    assert summary.planned is not None
    assert summary.credits_spent <= (summary.planned["max"] or 0)
    assert summary.difference is None
    first, *others = [each for each in summary.providers if not each["verifies"]]
    assert first["asked"] + first["presumed"] + (summary.providers_not_reported or 0) == audit["accepted"]
    for before, after in zip([first, *others], others, strict=False):
        passed_on = before["asked"] + before["presumed"] - before["found"]
        assert after["asked"] + after["presumed"] <= passed_on


@pytest.mark.long
def test_resumed_run_explains_balance(tmp_path: Path, workspace: Workspace) -> None:
    """The balance of a resumed run is explained: the API refunds what it had reserved for earlier tasks."""
    workspace.write_leads(make_leads(12))
    with serve_api(tmp_path / "api.db", latency="fixed(600)") as api:
        workspace.submit_without_collecting(api)
        waited = iter([601])
        summary = workspace.run_job(
            api, on_progress=lambda _: api.advance(next(waited, 0))
        )  # after its balance is read

    assert summary.balance_before is not None
    assert summary.balance_after is not None
    assert summary.balance_before - summary.balance_after < summary.credits_spent
    assert summary.difference is not None
    assert summary.difference["unexplained"] == 0
    assert "results of earlier requests" in "\n".join(format_details(summary))


def test_signal_skips_provider_stats(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a signal the provider statistics are skipped, unless there are only a few answers to read."""
    workspace.write_leads(make_leads(3))
    summary = workspace.run_job(api)
    signals = SignalHandler(on_first_signal=lambda _: None)

    with closing(workspace.open_ledger()) as ledger:
        signals.received = ExitCode.TERMINATED
        few = read_provider_totals(ledger, signals, summary)
        monkeypatch.setattr("enrich.run.finish.MAX_READ_WHEN_INTERRUPTED", 2)
        many = read_provider_totals(ledger, signals, summary)

    assert few is not None
    assert few.answers == 3
    assert many is None


def run_on_terminal(workspace: Workspace, api: SandboxApi, term: str = "xterm", no_color: str = "") -> str:
    """Run the job on a terminal of 80 columns and return the screen."""
    controller, terminal = os.openpty()
    with workspace.start_subprocess(
        *("run", "job.yaml", "--yes"), api=api, terminal=terminal, TERM=term, COLUMNS="80", NO_COLOR=no_color
    ) as run:
        os.close(terminal)
        shown = read_terminal(controller)
        run.wait(timeout=60)
    os.close(controller)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.long
def test_terminal_colors(api: SandboxApi, workspace: Workspace) -> None:
    """With NO_COLOR or a dumb terminal the text is the same without colors."""
    workspace.write_leads([*make_leads(3), ["", "", "", "", ""]])
    workspace.run_job(api, timing=SHORT_TIMEOUTS)

    coloured = run_on_terminal(workspace, api)
    plain = run_on_terminal(workspace, api, no_color="1")

    assert "\x1b[32m✓\x1b[0m" in coloured
    assert "\x1b[" not in plain[plain.index("✓") :]
    assert "\x1b[" not in run_on_terminal(workspace, api, term="dumb")
    assert " · 1 skipped (" in plain or "  1 skipped (" in plain


@pytest.mark.long
def test_commands_use_given_paths(tmp_path: Path, workspace: Workspace) -> None:
    """Commands use the paths as given, so they work in the reader's folder, with the ledger that the run used."""
    workspace.write_leads(make_leads(30))
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        given = "run", "job.yaml", "--output", "o.csv"
        result = workspace.run_in_process(*given, "--ledger", "my ledger.db", api=api)
        # Of a cron job, whose environment a reader's shell does not have.
        of_cron = workspace.run_in_process(*given, "--new-ledger", api=api, ENRICH_LEDGER="other ledger.db")

    assert (result.exit_code, of_cron.exit_code) == (10, 10)
    command = ": enrich run job.yaml --ledger '{} ledger.db' --output o.csv --retry failed\n"
    assert command.format("my") in result.stderr
    assert command.format("other") in of_cron.stderr


@pytest.mark.long
def test_file_name_starting_with_dash(tmp_path: Path, workspace: Workspace) -> None:
    """For a job file whose name starts with a dash, the command still works when pasted."""
    workspace.write_leads(make_leads(3))
    workspace.write_job().rename(workspace.folder / "-job.yaml")
    with serve_api(tmp_path / "api.db", failure_rate=1.0, free_failures=0.0) as api:
        result = workspace.run_in_process("run", "--summary", "--", "-job.yaml", api=api)
        (line,) = (line for line in result.stderr.splitlines() if "--retry failed" in line)
        command = line[line.index("enrich run") :].split()
        again = workspace.run_in_process(*command[1:], api=api)

    assert command == ["enrich", "run", "./-job.yaml", "--retry", "failed"]
    assert (result.exit_code, again.exit_code) == (10, 10)
