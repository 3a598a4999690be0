"""What a file cannot hold: refused before anything is sent if the input is the reason, shortened if an answer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from enrich.files import csv_format, excel_format
from enrich.files.text import FileProblem
from enrich.files.writer import FileLimits, limits_of
from enrich.job.spec import Output
from enrich.run import collector, output_cells
from tests.support.cases import in_turn
from tests.support.table_files import read_table
from tests.support.workspace import HEADER, SandboxApi, Workspace, make_leads

LONG = "x" * 32_768


def leads_with(note: str) -> list[list[str]]:
    """Make three leads; the last has this note."""
    return [*make_leads(2), [*make_leads(3)[2][:4], note]]


#: The settings of the job, the note in row 3, and words of the message.
IMPOSSIBLE: dict[str, tuple[dict[str, str], str, tuple[str, ...]]] = {
    "encoding": ({"output": "{path: out.csv, encoding: cp1252}"}, "李", ("row 3, column `Note`", "cp1252", "utf-8")),
    "two signs of one byte": ({"output": "{path: out.csv, encoding: shift_jis}"}, "¥", ("row 3, column `Note`",)),
    "rejects": ({"rejects": "{path: no.tsv, encoding: ascii}"}, "é", ("row 3, column `Note`", "the rejects (no.tsv)")),
    "long cell": ({"output": "out.xlsx"}, LONG, ("row 3, column `Note`", "32,767 characters", ".parquet")),
    "long for Excel": ({"output": "out.xlsx"}, "😀" * 16_384, ("row 3, column `Note`", "32,767 characters")),
    "rows": ({"output": "out.xlsx"}, "", ("row 3:", "at most 2 rows")),
}


@in_turn("command", ["run", "plan", "check"])
@in_turn("name", list(IMPOSSIBLE))
def test_impossible_output_is_refused_before_spending(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    """Exit 5 from all three commands, with row, column and remedy, without the cell, and nothing is sent."""
    settings, note, words = IMPOSSIBLE[name]
    if name == "rows":
        monkeypatch.setattr(excel_format, "MAX_ROWS", 3)
    workspace.write_job(**settings)
    workspace.write_leads(leads_with(note))

    result = workspace.run_in_process(command, "job.yaml", "--json", api=api)

    assert result.exit_code == 5, result.stderr
    for word in ("leads.csv", *words):
        assert word in result.stderr
    assert not note or note not in result.stderr
    assert api.audit()["accepted"] == 0


def test_cells_that_are_not_written(api: SandboxApi, workspace: Workspace) -> None:
    """Only the key and the merged columns are in the change feed, no new column in the rejects, and no old status."""
    workspace.write_leads(
        [[*lead, "found", "李"] for lead in leads_with("李")], [*HEADER, "enrich_status", "enrich_error"]
    )
    narrow = "path: {}, encoding: ascii"
    changes = f"{{{narrow.format('changes.csv')}, key: First Name}}"
    workspace.write_job(columns="{Почта: email}", rejects="{path: no.csv}", output="out.csv", changes=changes)
    refused = workspace.run_in_process("run", "job.yaml", api=api)
    assert (refused.exit_code, "column `Почта`: `ascii`, the encoding of the changes" in refused.stderr) == (5, True)

    workspace.write_job(columns="{mail: email}", changes=changes)
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    workspace.write_leads(
        [[*lead, "found", "李"] for lead in make_leads(3)], [*HEADER, "enrich_status", "enrich_error"]
    )
    workspace.write_job(columns="{Почта: email}", rejects=f"{{{narrow.format('no.csv')}}}")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0


def test_too_many_columns(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new columns count too: the five of the input would fit."""
    monkeypatch.setattr(excel_format, "MAX_COLUMNS", len(HEADER) + 6)
    workspace.write_job(output="out.xlsx")
    workspace.write_leads(make_leads(1))
    for command in ("run", "plan", "check"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert result.exit_code == 5
        assert "would have 12 columns" in result.stderr
    assert api.audit()["accepted"] == 0


def test_too_long_for_our_own_reader(api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that a CSV of ours could not be read back with is refused."""
    monkeypatch.setattr(csv_format, "MAX_CELL_CHARACTERS", 100)
    (workspace.folder / "leads.jsonl").write_text(
        json.dumps(dict(zip(HEADER, make_leads(1)[0], strict=True)) | {"Note": "n" * 101})
    )
    workspace.write_job(input="leads.jsonl")
    result = workspace.run_in_process("run", "job.yaml", api=api)
    assert (result.exit_code, api.audit()["accepted"]) == (5, 0)
    assert "row 1, column `Note`" in result.stderr


@in_turn(
    ("output", "expected"),
    [
        ("{path: out.csv, encoding: ascii}", ("J?rgen ?", "work_email: characters that ascii lacks are `?`")),
        ("{path: out.csv, encoding: cp1252}", ("Jürgen ?", "work_email: characters that cp1252 lacks are `?`")),
        ("out.xlsx", ("Jürgen", "work_e")),
        ("out.jsonl", ("Jürgen 李", "")),
    ],
)
def test_answers_never_fail_the_file(
    api: SandboxApi, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, output: str, expected: tuple[str, str]
) -> None:
    """What an answer makes impossible is changed, and the row says so; the ledger keeps it: utf-8 writes it whole."""
    monkeypatch.setattr(
        output_cells, "answer_columns", lambda answers, _: [pl.Series("", ["Jürgen 李" for _ in answers], pl.String)]
    )
    real = limits_of
    if "xlsx" in output:

        def short(kind: str, settings: Output) -> FileLimits:
            made = real(kind, settings)
            return made if made.max_cell is None or kind != "output" else FileLimits(made.name, max_cell=6)

        monkeypatch.setattr(collector, "limits_of", short)
    workspace.write_job(output=output)
    workspace.write_leads(make_leads(2))

    result = workspace.run_in_process("run", "job.yaml", api=api)

    assert result.exit_code == 0, result.stderr
    path = workspace.folder / output.removeprefix("{path: ").split(",")[0]
    if "encoding" in output:
        path.write_bytes(path.read_bytes().decode("cp1252").encode())
    header, *rows = read_table(path)
    found: list[dict[str, Any]] = [dict(zip(header, row, strict=True)) for row in rows]
    found = [row for row in found if row["enrich_status"] == "found"]
    assert found
    assert {(row["work_email"], row["enrich_error"]) for row in found} == {expected}


@in_turn(
    ("path", "encoding", "text", "fitted"),
    [
        ("a.csv", "cp1252", "Zoë ✓ 李", "Zoë ? ?"),
        ("a.csv", "shift_jis", "¥100", "?100"),
        ("a.csv", "cp864", "50%", "50?"),
        ("a.csv", "iso2022_jp", "\x1b$Bab", "?$Bab"),
        ("a.csv", "utf-16", "✓", "✓"),
        ("a.xlsx", "utf-8", "x" + "😀" * 16_384, "x" + "😀" * 16_383),
        ("a.xlsx", "utf-8", LONG, LONG[:-1]),
        ("a.parquet", "utf-8", LONG, LONG),
    ],
)
def test_fit(path: str, encoding: str, text: str, fitted: str) -> None:
    """Only what cannot be written changes, and a pair of UTF-16 units is not cut in two."""
    column = pl.Series("c", ["plain", None, text])
    cells, reasons = limits_of("output", Output(path=path, encoding=encoding)).fit(column)
    assert cells.to_list() == ["plain", None, fitted]
    assert list(reasons) == ([] if text == fitted else [2])


def test_names_of_columns() -> None:
    """A column name that the encoding lacks is refused as the header."""
    limits = limits_of("output", Output(path="a.csv", encoding="cp1252"))
    with pytest.raises(FileProblem, match=r"in\.csv: the header, column `名`"):
        limits.check_columns(["a", "名"], "in.csv")


def test_other_output_on_the_command_line(api: SandboxApi, workspace: Workspace, tmp_path: Path) -> None:
    """`--output` decides, for `run` and for `collect`."""
    workspace.write_job(output="out.xlsx")
    workspace.write_leads(leads_with(LONG))
    assert workspace.run_in_process("run", "job.yaml", "--output", "out.csv", api=api).exit_code == 0
    result = workspace.run_in_process("collect", "job.yaml", api=api)
    assert result.exit_code == 5
    assert "row 3, column `Note`" in result.stderr
    assert workspace.run_in_process("collect", "job.yaml", "--output", str(tmp_path / "o.csv"), api=api).exit_code == 0
