"""Leads from several files and from stdin; enrolling and collecting read the same rows in the same order."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from enrich.errors import CommandRefused, JobError
from enrich.files.reader import InputTable
from enrich.job.job import Overrides, load_job
from enrich.job.locations import STDIN, ObjectUrl, parse_location
from enrich.job.spec import Input
from tests.support.cases import in_turn
from tests.support.program import ProgramStart
from tests.support.table_files import INPUTS, read_table, write_table
from tests.support.workspace import (
    HEADER,
    ProgramResult,
    SandboxApi,
    Workspace,
    make_leads,
    serve_api,
    wait_until,
)


def run_with_stdin(
    workspace: Workspace, api: SandboxApi, data: bytes | None, *arguments: str, **environ: str
) -> ProgramResult:
    """Run the program with `data` on stdin; None: stdin is closed."""
    closed = (0,) if data is None else ()
    start = ProgramStart(arguments, str(workspace.folder), workspace.environment(api) | environ, closed=closed)
    process = start.start(subprocess.PIPE)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # the program did not read it to its end
        os.write(process.stdin.fileno(), data or b"")
    stdout, stderr = process.communicate(timeout=60)
    return ProgramResult(process.returncode, stdout, stderr)


# Several files


def write_inputs(folder: Path, *tables: list[list[str]], ending: str = "csv") -> Path:
    """Write a.csv, b.csv and so on; return the pattern that matches them."""
    for name, (header, *rows) in zip("abcdef", tables, strict=False):
        write_table(folder / f"{name}.{ending}", header, rows)
    return folder / f"*.{ending}"


def read_rows(pattern: Path, **options: str) -> list[tuple[object, ...]]:
    """Read all rows."""
    source = InputTable(pattern, Input.model_validate({"path": str(pattern), **options}))
    return [row for frame in source.batches() for row in frame.rows()]


@in_turn("ending", ["csv", "csv.gz", "tsv", "jsonl", "parquet", "xlsx"])
def test_glob_reads_matching_files(tmp_path: Path, ending: str) -> None:
    """Matching files are read in the order of their names, without hidden files and folders."""
    pattern = write_inputs(tmp_path, [["A", "B"], ["1", "2"]], [["A", "B"], ["3", "4"], ["5", "6"]], ending=ending)
    (tmp_path / f".hidden.{ending}").write_text("?")
    (tmp_path / f"folder.{ending}").mkdir()
    assert read_rows(pattern) == [("1", "2"), ("3", "4"), ("5", "6")]


@in_turn(
    ("header", "difference"),
    [
        (["A"], "`B` is missing"),
        (["A", "b"], "`B` is missing, `b` is new"),
        (["A", "B", "C"], "`C` is new"),
        (["B", "A"], "column 1 is `B`, not `A`"),
    ],
)
@in_turn("ending", ["csv", "parquet", "xlsx"])
def test_different_header_is_reported(tmp_path: Path, ending: str, header: list[str], difference: str) -> None:
    """A different header is an error that shows the difference: shifted columns would be paid for."""
    pattern = write_inputs(
        tmp_path, [["A", "B"], ["1", "2"]], [["A", "B"], ["1", "2"]], [header, header], ending=ending
    )
    with pytest.raises(CommandRefused) as caught:
        read_rows(pattern)
    different, first = tmp_path / f"c.{ending}", tmp_path / f"a.{ending}"
    assert caught.value.message == f"{different}: its header differs from that of {first}: {difference}"


def test_jsonl_files_merge_keys(tmp_path: Path) -> None:
    """The files' keys are merged into one header, like the keys of the lines of one file."""
    (tmp_path / "a.jsonl").write_text('{"A": "1"}\n')
    (tmp_path / "b.jsonl").write_text('{"A": 2, "B": true}\n')
    source = InputTable(tmp_path / "*.jsonl", Input(path="*.jsonl"))
    assert list(source.schema) == ["A", "B"]
    assert sum(frame.height for frame in source.batches()) == 2


def test_pattern_without_extension(tmp_path: Path) -> None:
    """A pattern without an extension reads files that all have the same one."""
    write_inputs(tmp_path, [["A", "B"], ["1", "2"]], [["A", "B"], ["3", "4"]], ending="tsv.gz")
    assert read_rows(tmp_path / "*") == [("1", "2"), ("3", "4")]
    write_table(tmp_path / "c.jsonl", ["A", "B"], [["1", "2"]])
    with pytest.raises(CommandRefused, match=f"{tmp_path}/c.jsonl is JSON Lines, but {tmp_path}/a.tsv.gz is not"):
        read_rows(tmp_path / "*")


def test_error_names_file_and_line(tmp_path: Path) -> None:
    """An error names the file, and counts rows and lines from its beginning."""
    pattern = write_inputs(tmp_path, [["A", "B"], ["1", "2"]], [["A", "B"], ["1", "2"], ["3"]])
    with pytest.raises(CommandRefused, match=rf"{tmp_path}/b.csv: row 2 \(line 3\) has 1 cell"):
        read_rows(pattern)


def test_pattern_without_match(workspace: Workspace, api: SandboxApi) -> None:
    """A pattern without a match is exit 5 and spends nothing: the export may not have arrived yet."""
    workspace.write_job(input='"in/*.csv"')
    result = workspace.run_in_process("run", "job.yaml", api=api)
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        5,
        f"error: {workspace.folder}/in/*.csv: no file matches",
    )


@in_turn("kind", INPUTS)
def test_file_name_with_glob_characters(tmp_path: Path, kind: str) -> None:
    """A file named `leads[1].csv`, as browsers save it, and a job folder with such a name are no patterns."""
    folder = tmp_path / "old [1]"
    folder.mkdir()
    write_table(folder / f"leads[1].{kind}", ["A"], [["1"]])
    job = "version: 1\nwaterfall: w\nparams: {a: A}\ninput: "
    for named, name in ((f"leads[1].{kind}", "leads[1]_enriched.csv"), (f'"*.{kind}"', "job_enriched.csv")):
        (folder / "job.yaml").write_text(job + named)
        loaded = load_job(folder / "job.yaml")
        assert [row for frame in InputTable(loaded.input_path, loaded.input).batches() for row in frame.rows()] == [
            ("1",)
        ]
        assert loaded.output.path == name


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("leads/*.csv", "leads/out.csv"),
        ("leads/*.csv", "leads/%Y.csv"),
        ("leads/*.csv", "soft.csv"),
        ("leads/*.csv", "leads/../leads/x.csv"),
        ("leads/", "leads/out.csv"),
    ],
)
def test_output_that_the_input_includes(workspace: Workspace, api: SandboxApi, source: str, output: str) -> None:
    """An output that the input would include is exit 2 with its name, before anything is spent or read."""
    (workspace.folder / "leads").mkdir()
    leads = write_table(workspace.folder / "leads" / "a.csv", HEADER, make_leads(1))
    (workspace.folder / "soft.csv").symlink_to(leads)
    workspace.write_job(input=f'"{source}"', output=output)
    for command in ("check", "plan", "run"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert result.exit_code == 2, command
        assert f": output: {workspace.folder}/{'soft' if output == 'soft.csv' else 'leads/'}" in result.stderr
        assert result.stderr.count("would be read as input by the next run") == 1
    assert api.audit()["accepted"] == 0


@in_turn(
    ("key", "value"),
    [
        ("output", "out.csv"),
        ("rejects", "rejects.csv"),
        ("changes", "{path: changes.csv, key: [A]}"),
        ("ledger", "ledger.csv"),
    ],
)
def test_files_matching_input_pattern(tmp_path: Path, key: str, value: str) -> None:
    """For each file to write that matches the pattern, the message shows which key to change."""
    written = {"input": '"*.csv"', "output": "out/o.csv", key: value}
    keys = "".join(f"{name}: {text}\n" for name, text in written.items())
    (tmp_path / "job.yaml").write_text(f"version: 1\nwaterfall: w\nparams: {{a: A}}\n{keys}")
    job = load_job(tmp_path / "job.yaml")
    with pytest.raises(JobError, match=rf"{key}: .*.csv: the {key} would be read as input") as caught:
        job.file_locations(datetime.now().astimezone())
    assert caught.value.hint == f"choose another `{key}`, or a narrower pattern than *.csv"


def test_added_file_sends_only_its_rows(workspace: Workspace, api: SandboxApi) -> None:
    """An added file sends only its own rows; positions continue, and the output has the rows of all files."""
    (workspace.folder / "in").mkdir()
    workspace.write_job(input='"in/*.csv"')
    write_table(workspace.folder / "in" / "2026-11-01.csv", HEADER, make_leads(3))
    assert workspace.run_job(api).submitted == 3
    write_table(workspace.folder / "in" / "2026-10-31.csv", HEADER, make_leads(2, start=2))  # one lead is known
    summary = workspace.run_job(api)
    assert (summary.rows, summary.submitted, summary.reused) == (5, 1, 3)
    assert [row["First Name"][5:] for row in workspace.read_output()] == ["2", "3", "0", "1", "2"]
    assert api.audit()["accepted"] == 4


def test_file_added_during_run(tmp_path: Path) -> None:
    """A file added during the run is reported like a change of a single file."""
    pattern = write_inputs(tmp_path, [["A"], ["1"]], [["A"], ["2"]])
    source = InputTable(pattern, Input(path="*.csv"))
    before = source.file_versions()
    assert source.file_versions() == before
    write_table(tmp_path / "c.csv", ["A"], [])
    assert source.file_versions() != before
    (tmp_path / "c.csv").unlink()
    assert source.file_versions() == before


# Through a pipe


@pytest.mark.long
@pytest.mark.parametrize("packed", ["plain", "gzip"])
def test_input_from_stdin(workspace: Workspace, api: SandboxApi, packed: str) -> None:
    """Stdin is read in the format of the job's input, and its copy on disk is removed at the end."""
    workspace.write_job(input="leads.jsonl", output="out.jsonl")
    (workspace.folder / "tmp").mkdir()
    lines = "".join(json.dumps({**dict(zip(HEADER, lead, strict=True)), "n": 1.0}) + "\n" for lead in make_leads(3))
    data = gzip.compress(lines.encode()) if packed == "gzip" else lines.encode()

    result = run_with_stdin(
        workspace, api, data, "run", "job.yaml", "--input", "-", "--json", TMPDIR=str(workspace.folder / "tmp")
    )

    assert (result.exit_code, result.json_output["rows"], result.json_output["submitted"]) == (0, 3, 3)
    assert [row[5] for row in read_table(workspace.folder / "out.jsonl")[1:]] == [1.0] * 3
    assert list((workspace.folder / "tmp").iterdir()) == []


@pytest.mark.long
def test_job_file_with_stdin_input(workspace: Workspace, api: SandboxApi) -> None:
    """Stdin is CSV unless the job sets another format, and the output still gets a name."""
    (workspace.folder / "job.yaml").write_text(
        'version: 1\ninput: "-"\nwaterfall: email_getter\n'
        "params: {first_name: A, last_name: B, company: {value: a.example}}\n"
    )
    assert run_with_stdin(workspace, api, b"A,B\nAda,Lovelace\n", "run", "job.yaml").exit_code == 0
    assert len(workspace.read_output("stdin_enriched.csv")) == 1
    assert run_with_stdin(workspace, api, b"A,B\nAda,Lovelace\n", "collect", "job.yaml").exit_code == 0


@pytest.mark.long
@pytest.mark.parametrize("in_job_file", [False, True])
@pytest.mark.parametrize(
    ("data", "message_start"),
    [
        (b"", "error: standard input is empty"),
        (b"First Name\nx,y\n", "error: "),
        (",".join(HEADER).encode() + b"\n1,2\n", "error: standard input: row 1 (line 2) has 2 cells"),
        (None, "error: standard input is a terminal, or closed"),
    ],
)
def test_unusable_stdin(
    workspace: Workspace, api: SandboxApi, data: bytes | None, message_start: str, *, in_job_file: bool
) -> None:
    """Unusable stdin is an error before anything is spent, and its copy on disk is removed."""
    copies = workspace.folder / "tmp"
    copies.mkdir()
    if in_job_file:
        workspace.write_job(input='"-"')
    options = () if in_job_file else ("--input", "-")
    result = run_with_stdin(workspace, api, data, "run", "job.yaml", *options, TMPDIR=str(copies))
    assert (result.exit_code, result.stderr.startswith(message_start)) == (
        2 if message_start == "error: " else 5,
        True,
    ), result.stderr
    assert api.audit()["accepted"] == 0
    assert list(copies.iterdir()) == []


@pytest.mark.long
def test_stdin_terminal_is_refused(workspace: Workspace, api: SandboxApi) -> None:
    """A terminal as stdin is refused with a message: the pipe was probably forgotten."""
    controller, terminal = os.openpty()
    try:
        process = workspace.start_subprocess("run", "job.yaml", "--input", "-", api=api, stdin=terminal)
        _, stderr = process.communicate(timeout=60)
    finally:
        os.close(controller)
        os.close(terminal)
    assert process.returncode == 5
    assert stderr.startswith("error: standard input is a terminal")


@pytest.mark.long
@pytest.mark.parametrize("waiting_at_the_api", [0, 2])
def test_signal_while_reading_stdin(tmp_path: Path, workspace: Workspace, waiting_at_the_api: int) -> None:
    """A signal while reading stdin gives its exit code; nothing is sent, and the partial copy is removed."""
    (workspace.folder / "tmp").mkdir()
    workspace.write_leads(make_leads(waiting_at_the_api))
    with serve_api(tmp_path / "slow.db", latency="fixed(60)") as api:
        if waiting_at_the_api:
            workspace.submit_without_collecting(api)
        asked = api.audit()["requests"]
        process = workspace.start_subprocess(
            *("run", "job.yaml", "--input", "-"),
            api=api,
            stdin=subprocess.PIPE,
            TMPDIR=str(workspace.folder / "tmp"),
        )
        assert process.stdin is not None
        process.stdin.write("First Name\n")
        process.stdin.flush()
        wait_until(lambda: process.poll() is not None or any((workspace.folder / "tmp").iterdir()))
        process.terminate()
        _, result = process.communicate(timeout=90)
        assert (process.returncode, "Traceback" in result) == (143, False)
        assert api.audit()["requests"] == asked
    assert list((workspace.folder / "tmp").iterdir()) == []


def test_stdin_copy_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy holds personal data: only its owner can read it, and it is removed with the object that reads it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with (tmp_path / "leads.csv").open("w+") as file:
        file.write("A\n1\n")
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", file)
        source = InputTable(STDIN, Input(path="-"))
    (folder,) = tmp_path.glob("enrich-*")
    (copy,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, copy.stat().st_mode & 0o777) == (0o700, 0o600)
    assert source.file_versions() == source.file_versions()
    del source
    assert not folder.exists()


# Input options of the job file and the command line


@in_turn(
    ("job", "given", "kind", "separator"),
    [
        ("leads.csv", None, "csv", ","),
        ("leads.TSV.gz", None, "csv", "\t"),
        ("leads.txt", None, "csv", ","),
        ("leads.ndjson.gz", None, "jsonl", ","),
        ("leads.parquet", None, "parquet", ","),
        ("leads.xlsx", None, "xlsx", ","),
        ("{path: export, format: xlsx, sheet: New}", None, "xlsx", ","),
        ('{path: "-", format: jsonl}', None, "jsonl", ","),
        ("leads.tsv", "-", "csv", "\t"),
        ("leads.jsonl", "-", "jsonl", ","),
        ("leads.jsonl", "other.csv", "csv", ","),
        ("{path: leads.csv, separator: ;}", "other.tsv", "csv", ";"),
        ("{path: export, format: xlsx, sheet: New}", "other.csv", "csv", ","),
        ("{path: export, format: jsonl}", "other", "jsonl", ","),
    ],
)
def test_format_by_extension(tmp_path: Path, job: str, given: str | None, kind: str, separator: str) -> None:
    """The extension gives the format unless the job sets it; an input from the command line has its own format."""
    text = f"version: 1\ninput: {job}\nwaterfall: w\nparams: {{a: A}}\n"
    (tmp_path / "job.yaml").write_text(text.replace(";}", '";"}'))
    result = load_job(tmp_path / "job.yaml", Overrides(input=given)).input
    assert (result.format, result.separator) == (kind, separator)


@in_turn(
    ("line", "expected"),
    [
        ("input: {path: a.csv, sheet: New}", "2: input: `sheet` is for workbooks: format xlsx"),
        ("input: {path: a.csv, format: xls}", "2: input.format: must be 'csv', 'jsonl', 'parquet' or 'xlsx'"),
        ("input: ftp://a/b.csv", "2: input: `ftp://` is an unknown object storage: use s3://, gs://, az://"),
        ("input: s3://bucket", "2: input: an object storage URL needs a bucket and an object: s3://bucket/leads.csv"),
        (
            "input: s3://id:secret@bucket/a.csv",
            "2: input: a URL must have no credentials: they come from the environment",
        ),
    ],
)
def test_input_option_errors(tmp_path: Path, line: str, expected: str) -> None:
    """An invalid input option is reported with file, line and key."""
    (tmp_path / "job.yaml").write_text(f"version: 1\n{line}\nwaterfall: w\nparams: {{a: A}}\n")
    with pytest.raises(JobError) as caught:
        load_job(tmp_path / "job.yaml")
    assert caught.value.message == f"{tmp_path}/job.yaml:{expected}"


def test_path_or_url_parsing(tmp_path: Path) -> None:
    """URLs don't depend on the working directory and keep their slashes."""
    assert parse_location(tmp_path, "a/../b.csv") == tmp_path / "b.csv"
    assert parse_location(tmp_path, "S3://bucket/.a/b..csv/") == ObjectUrl("s3", "bucket", ".a/b..csv/")
    for key in ("/a.csv", "x//a.csv", "./a.csv", "x/../a.csv", "x//", "x/..", "a\tb.csv"):  # read as another object
        with pytest.raises(ValueError, match="an object's name cannot have `//`"):
            parse_location(tmp_path, f"s3://bucket/{key}")
