"""Small things of the files around a run: links, names, marks, numbers, and what the commands say about them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from enrich.errors import JobError
from enrich.job.job import load_job
from enrich.models import RequestResult, result_columns, to_credits
from enrich.run import output_cells
from enrich.run.output_cells import answer_cells
from tests.support.cases import in_turn
from tests.support.sample_reports import fake_renderer
from tests.support.workspace import JOB, SandboxApi, Workspace, make_leads


@pytest.mark.long
@pytest.mark.parametrize("key", ["output", "rejects", "report"])
def test_links_are_followed(api: SandboxApi, workspace: Workspace, key: str) -> None:
    """The file that a link leads to is replaced, also one that is not there yet, and no other file appears."""
    workspace.write_leads(make_leads(2))
    real = workspace.folder / "real"
    real.mkdir()
    suffix = "html" if key == "report" else "csv"
    if key == "output":
        (real / f"data.{suffix}").write_text("old")
    link = workspace.folder / f"link.{suffix}"
    link.symlink_to(Path("real", f"data.{suffix}"))
    workspace.write_job(**{key: link.name})

    with fake_renderer():
        result = workspace.run_in_process("run", "job.yaml", api=api)

    assert result.exit_code == 0, result.stderr
    assert link.readlink() == Path("real", f"data.{suffix}")
    assert [path.name for path in real.iterdir()] == [f"data.{suffix}"]
    assert (real / f"data.{suffix}").read_text() != "old"
    assert (real / f"data.{suffix}").stat().st_mode & 0o777 == 0o600


def test_link_to_a_dataset(api: SandboxApi, workspace: Workspace) -> None:
    """A dataset behind a link is replaced in its place."""
    workspace.write_leads(make_leads(2))
    (workspace.folder / "real").mkdir()
    (workspace.folder / "leads").symlink_to("real")
    workspace.write_job(output="leads/")
    for _ in range(2):
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    assert (workspace.folder / "leads").is_symlink()
    assert list((workspace.folder / "real").glob("*.parquet"))


def test_link_in_the_input_folder(api: SandboxApi, workspace: Workspace) -> None:
    """An output that is a link in the input's folder would be read by the next run, wherever it leads."""
    (workspace.folder / "in").mkdir()
    workspace.write_leads(make_leads(1), name="in/leads.csv")
    (workspace.folder / "in" / "out.csv").symlink_to("../out.csv")
    workspace.write_job(input="in/", output="in/out.csv")
    result = workspace.run_in_process("run", "job.yaml", api=api)
    assert result.exit_code == 2
    assert "would be read as input" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "header", [["enrich_at"], ["enrich_index"], ["enrich_status"], ["enrich_status", "enrich_credits"]]
)
def test_columns_of_our_names(api: SandboxApi, workspace: Workspace, header: list[str]) -> None:
    """Columns of a person that share our names are refused by all commands, and ours are replaced."""
    rows = make_leads(3)
    workspace.write_leads(
        [[*row, *["mine"] * len(header)] for row in rows],
        ["First Name", "Last Name", "Website", "Email", "Note", *header],
    )
    for command in ("run", "plan", "check"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert result.exit_code == 2, result.stderr
        assert f"`{header[0]}`" in result.stderr
    assert api.audit()["accepted"] == 0
    workspace.write_leads(rows)
    workspace.run_in_process("run", "job.yaml", api=api)
    (workspace.folder / "out.csv").rename(workspace.folder / "leads.csv")
    workspace.write_job(columns="{again: email}")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0


@in_turn(
    ("path", "code"),
    [
        ("100%_done.csv", "%_"),
        ("%Q.csv", "%Q"),
        ("a%.csv", "%."),
        ("%-d.csv", "%-"),
        ("x%E.csv", "%E"),
        ("%\u00e9.csv", "%\u00e9"),
        ("leads-%x.csv", "%x"),  # 12/31/26: a file in a folder in a folder
    ],
)
def test_unknown_date_codes(tmp_path: Path, path: str, code: str) -> None:
    """A code that systems read differently is refused, with the spelling of a percent sign."""
    for key in ("output", "rejects", "changes"):
        (tmp_path / "job.yaml").write_text(JOB.replace("output: out.csv\n", "") + f"{key}: '{path}'\n")
        with pytest.raises(JobError) as caught:
            load_job(tmp_path / "job.yaml")
        assert f"`{code}` is no date code for the name of a file" in caught.value.message
        assert "`%%`" in (caught.value.hint or "")
    (tmp_path / "job.yaml").write_text(JOB.replace("out.csv", "100%%_%Y-%m-%dT%H%M%S.csv"))
    load_job(tmp_path / "job.yaml")


@in_turn(
    ("answer", "cell"),
    [
        ("1.10", "1.10"),
        ("1e5", "1e5"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("NaN", None),
        ("Infinity", None),
        ("[1.10, NaN]", "[1.10, null]"),
        ('{"a": 2.50, "b": "é"}', '{"a": 2.50, "b": "é"}'),
        ("true", "true"),
        ('"1.10"', "1.10"),
    ],
)
def test_numbers_of_answers(answer: str, cell: str | None) -> None:
    """A number keeps its digits, and NaN is no value."""
    assert answer_cells(f'{{"data": {{"score": {answer}}}}}', ["score"]) == [cell]


def test_credits_have_no_noise() -> None:
    """The price of a row is the nearest number to the millionths in the ledger."""
    micros = range(0, 10_000_000, 10_000)
    results = result_columns(
        [
            RequestResult(row, 1, "found", None, None, None, cost, None, 0, None, 0, None)
            for row, cost in enumerate(micros)
        ]
    )
    frame = output_cells._status_frame(results, pl.lit(value=True).alias("found"))
    assert frame.get_column("enrich_credits").to_list() == [to_credits(cost) for cost in micros]


@pytest.mark.long
@in_turn("name", ["=new", "@x", "-x", "\uff1dx", "\t=x"])
def test_new_names_that_are_formulas(api: SandboxApi, workspace: Workspace, name: str) -> None:
    """The name of a new column that a spreadsheet would run is refused for CSV, and is text in a workbook."""
    workspace.write_leads(make_leads(1))
    escaped = name.replace("\t", "\\t")
    workspace.write_job(columns=f'{{"{escaped}": email}}')
    for command in ("run", "check"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert result.exit_code == 2
        assert "would run this name as a formula" in result.stderr
    workspace.write_job(columns=f'{{"{escaped}": email}}', output="out.xlsx")
    assert workspace.run_in_process("check", "job.yaml", api=api).exit_code == 0


def test_byte_order_mark_from_init_to_output(api: SandboxApi, workspace: Workspace) -> None:
    """`init` sets `utf-8-sig` where the input has a mark, the output begins with it, and is read again."""
    path = workspace.write_leads(make_leads(2))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    made = workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline", "-o", "new.yaml")
    assert (made.exit_code, made.stdout) == (0, "")
    assert "encoding: utf-8-sig" in (workspace.folder / "new.yaml").read_text()
    assert "Written: new.yaml" in made.stderr
    assert workspace.run_in_process("run", "new.yaml", api=api).exit_code == 0
    written = (workspace.folder / "leads_enriched.csv").read_bytes()
    assert written.startswith(b"\xef\xbb\xbfFirst Name,")
    assert not written[3:].startswith(b"\xef\xbb\xbf")


def test_init_refuses_a_file_without_header(workspace: Workspace) -> None:
    """No job file is written from the cells of a person, and none is shown."""
    (workspace.folder / "leads.csv").write_text("Adalina,Bironella,secret.person@a.example\nBob,C,b@b.example\n")
    result = workspace.run_in_process("init", "leads.csv", "--waterfall", "email_getter", "--offline", "-o", "new.yaml")
    assert result.exit_code == 5
    assert "the file has no header" in result.stderr
    assert "Adalina" not in result.stderr
    assert not (workspace.folder / "new.yaml").exists()


@in_turn("text", ["params:\n  a: b\n c: d\n", "params:\n   a: b\n  c: d\n", "limits: {a: 1}\n  b: 2\n", "a: b: c\n"])
def test_wrong_indentation(tmp_path: Path, text: str) -> None:
    """A wrong indentation has a hint."""
    (tmp_path / "job.yaml").write_text(f"version: 1\n{text}")
    with pytest.raises(JobError) as caught:
        load_job(tmp_path / "job.yaml")
    assert "indentation" in (caught.value.hint or "")


def test_doctor_takes_variables_from_the_environment(api: SandboxApi, workspace: Workspace) -> None:
    """`--env NAME` has the value of this shell; a name that is not set is a usage error."""
    workspace.write_leads(make_leads(1))
    names = ("--env", "DATABAR_API_KEY", "--env", "DATABAR_BASE_URL")
    result = workspace.run_in_process("doctor", "job.yaml", *names, api=api)
    assert "no API key" not in result.stdout
    assert "the key" in result.stdout or result.exit_code == 0
    wrong = workspace.run_in_process("doctor", "job.yaml", "--env", "NOT_SET_ANYWHERE", api=api)
    assert wrong.exit_code == 2
    assert "must be NAME=VALUE, or the NAME of a variable that is set" in wrong.stderr
