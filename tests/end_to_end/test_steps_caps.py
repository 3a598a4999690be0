"""The per-group limit of a job with steps, where several rows are the same lead."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import pytest

from enrich.rows.job_input import JobInput
from enrich.run.step_rows import StepRows
from tests.end_to_end.test_steps import HEADER, SHORT_JOB, make_people
from tests.support.cases import first_quick
from tests.support.workspace import SandboxApi, Workspace


def test_rows_of_one_lead_take_one_place(workspace: Workspace, api: SandboxApi) -> None:
    """Rows that send the same cells are one lead under `caps`: in the first run, later, and when collected."""
    first, second, third = make_people(3, companies=1)
    again = [*first[:4], "Engineer", ""]
    workspace.write_leads([first, again, second, third, first], HEADER)
    workspace.write_job(SHORT_JOB + "caps: {by: Website, max: 2}\n")

    assert workspace.run_job(api).exit_code == 0

    output = workspace.folder / "out.csv"
    written = output.read_bytes()
    taking_part = [row["enrich_email_status"] != "filtered" for row in workspace.read_output()]
    assert taking_part == [True, True, True, False, True]
    assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
    assert output.read_bytes() == written
    assert workspace.run_job(api).submitted == 0
    assert output.read_bytes() == written


@pytest.mark.parametrize("other_group", first_quick(1, ["Director", ""]))
def test_lead_in_two_groups(workspace: Workspace, api: SandboxApi, other_group: str) -> None:
    """A lead that takes part with one row does so with all: in the first run, later, and when collected."""
    first, second, third = make_people(3, companies=1)
    leads = [(second, "Engineer"), (first, "Engineer"), (third, "Engineer"), (first, other_group)]
    workspace.write_leads([[*lead[:4], group, ""] for lead, group in leads], HEADER)
    workspace.write_job(SHORT_JOB + "caps: {by: Title, max: 1}\n")

    assert workspace.run_job(api).exit_code == 0

    output = workspace.folder / "out.csv"
    written = output.read_bytes()
    left_out = [row["enrich_email_status"] == "filtered" for row in workspace.read_output()]
    assert left_out == [False, False, True, False]
    assert workspace.run_in_process("collect", "job.yaml").exit_code == 0
    assert output.read_bytes() == written
    assert workspace.run_job(api).submitted == 0
    assert output.read_bytes() == written


def test_each_row_takes_a_place_without_dedupe(workspace: Workspace, api: SandboxApi) -> None:
    """With `dedupe: false` each row is paid, so each takes a place of its group, also where the cells are the same."""
    workspace.write_leads(make_people(1) * 6, HEADER)
    workspace.write_job(SHORT_JOB + "dedupe: false\ncaps: {by: Website, max: 2}\n")
    workspace.run_job(api)
    assert [row["enrich_email_status"] == "filtered" for row in workspace.read_output()] == [False] * 2 + [True] * 4


def test_rows_added_while_counting(workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is added after the begun leads were found is one that no run has begun."""
    first, second, third = make_people(3, companies=1)
    workspace.write_leads([first, second], HEADER)
    workspace.write_job(SHORT_JOB + "caps: {by: Website, max: 2}\n")

    def add_row(_: JobInput, __: object) -> None:
        workspace.write_leads([first, second, third], HEADER)

    monkeypatch.setattr(JobInput, "queue_order", add_row)
    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.error) == (4, "the input changed during the run")
    assert [row["enrich_email_status"] == "filtered" for row in workspace.read_output()] == [False, False, True]


def test_rows_added_after_counting(workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is added after the leads of each group were counted is left to the next run."""
    first, second, third = make_people(3, companies=1)
    workspace.write_leads([first, second], HEADER)
    workspace.write_job(SHORT_JOB + "caps: {by: Website, max: 2}\n")
    begin = StepRows.begin

    def begin_and_add_row(rows: StepRows) -> None:
        begin(rows)
        workspace.write_leads([first, second, third], HEADER)

    monkeypatch.setattr(StepRows, "begin", begin_and_add_row)
    summary = workspace.run_job(api)

    assert (summary.exit_code, summary.error) == (4, "the input changed during the run")
    assert summary.steps[0]["submitted"] == 2


def test_signal_before_the_input_is_read(
    workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a signal, no pass over the input goes on, also not one that counts the leads of a group."""
    workspace.write_leads(make_people(3), HEADER)
    workspace.write_job(SHORT_JOB + "caps: {by: Website, max: 2}\n")
    stop: Future[None] = Future()
    advanced = 0
    advance = StepRows._advance

    def count_batches(*arguments: object, **options: object) -> None:
        nonlocal advanced
        advanced += 1
        advance(*arguments, **options)  # type: ignore[arg-type]

    def stop_once(_: object) -> None:
        with suppress(InvalidStateError):
            stop.set_result(None)

    monkeypatch.setattr(StepRows, "_advance", count_batches)
    summary = workspace.run_job(api, stop=stop, on_progress=stop_once)

    assert (summary.exit_code, advanced) == (130, 0)
