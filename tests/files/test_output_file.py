"""The output: published whole or not at all, replacing only our own files, with input cells unchanged."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.databar.task_results import TaskReply, read_answer, task_phase
from enrich.errors import UNWRITABLE_HINT, CommandRefused, EnrichError, JobError
from enrich.files import reader
from enrich.files.writer import prepare_file, temporary_path, write_file
from enrich.job.job import Overrides, load_job
from enrich.job.locations import parse_location
from enrich.job.spec import Output
from enrich.job.target import Target, TargetKind
from enrich.ledger import enroll, queries, queue, records, transitions
from enrich.ledger.database import Database
from enrich.models import Answer, RowStatus, State
from enrich.rows.batches import STATUS_COLUMNS
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.collector import Collector
from enrich.run.output_cells import to_cell
from tests.support.cases import examples, first_quick, in_turn
from tests.support.ledger import DEFAULT_SELECTION

CALL = Target(TargetKind.WATERFALL, "email_getter", (833,))
STATUS = list(STATUS_COLUMNS)
NAMES = ["out.csv", "out.csv.gz", "out.tsv", "out.jsonl", "out.jsonl.gz", "out.parquet", "out.xlsx"]
JOB = "version: 1\ninput: leads.csv\nwaterfall: email_getter\n"


def write_output(target: Path, values: Sequence[Any], kind: type[pl.DataType] = pl.String, **options: str) -> Path:
    """Write a file with one input column and one new column of the same values."""
    frame = pl.DataFrame({"old": [str(value) for value in values], "new": pl.Series(values, dtype=kind)})
    output = Output(path=target.name, **options)
    write_file(target, output, job="job", schema=frame.schema, frames=iter([frame]), new_columns=1)
    return target


def read_cells(path: Path, encoding: str = "utf-8", separator: str = ",") -> list[list[str]]:
    """Read a CSV file."""
    with path.open(newline="", encoding=encoding) as file:
        return list(csv.reader(file, delimiter=separator, strict=True))


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Limit the size of any file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)  # Python would leave a truncated compiled module behind
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class InterruptedByTestError(Exception):
    """The error that a signal raises between two batches."""


@in_turn("name", NAMES)
@in_turn("error", [CommandRefused("the input changed"), InterruptedByTestError(), KeyboardInterrupt()], ids=repr)
def test_unfinished_file_is_not_published(tmp_path: Path, name: str, error: BaseException) -> None:
    """An unfinished file is not published: the old one stays, no part is left, and the error is raised unchanged."""
    frame = pl.DataFrame({"old": ["x"], "new": ["y"]})
    target = tmp_path / name
    target.write_text("the old one")

    def frames() -> Iterator[pl.DataFrame]:
        yield frame
        raise error

    with pytest.raises(type(error)) as caught:
        write_file(target, Output(path=name), job="job", schema=frame.schema, frames=frames(), new_columns=1)
    assert caught.value is error
    assert target.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [target]


@in_turn("name", ["out.csv", "out/"])
def test_runs_with_different_ledgers_share_a_folder(tmp_path: Path, name: str) -> None:
    """A run that begins and ends while another one of a job with the same name writes its output disturbs nothing."""
    tmp_path.joinpath("job.yaml").write_text(JOB + "params: {first_name: a}\n")
    frame = pl.DataFrame({"a": ["x"]})

    def write(ledger: str, frames: Iterator[pl.DataFrame]) -> None:
        job = load_job(tmp_path / "job.yaml", Overrides(ledger=ledger))
        target = parse_location(tmp_path, f"{ledger}-{name}")
        prepare_file(target, job.input_path, job.temporary_name)
        schema, output = frame.schema, Output(path=name)
        write_file(target, output, job=job.temporary_name, schema=schema, frames=frames, new_columns=1)

    def interrupted_frames() -> Iterator[pl.DataFrame]:
        yield frame
        write("second", iter([frame]))
        yield frame

    write("first", interrupted_frames())

    assert {path.name for path in tmp_path.iterdir() if "-out" in path.name} == {
        f"{ledger}-{name.rstrip('/')}" for ledger in ("first", "second")
    }


KILLED_SCRIPT = """
import os, signal, sys
from pathlib import Path
import polars as pl
from enrich.job.spec import Output
from enrich.files import reader
from enrich.files.writer import write_file

def frames():
    for _ in range(3):
        yield pl.DataFrame({"old": ["x"] * 20_000, "new": ["y"] * 20_000})
    os.kill(os.getpid(), signal.SIGKILL)

target = Path(sys.argv[1])
schema = dict.fromkeys(["old", "new"], pl.String())
write_file(target, Output(path=target.name), job="job", schema=schema, frames=frames(), new_columns=1)
"""


@pytest.mark.long
@in_turn("name", ["out.csv.gz", "out.jsonl", "out.parquet", "out.xlsx"])
def test_kill_keeps_old_file(tmp_path: Path, name: str) -> None:
    """A kill keeps the old file and leaves at most one part, which the next start removes."""
    target = tmp_path / "out" / name
    target.parent.mkdir()
    target.write_text("the old one")
    environ = {**os.environ, "TMPDIR": str(tmp_path)}  # workbooks are built there, so the leftovers are ours
    process = subprocess.run([sys.executable, "-c", KILLED_SCRIPT, str(target)], env=environ, check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert target.read_text() == "the old one"
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("enrich-*")} <= {0o700}
    prepare_file(target, tmp_path / "leads.csv", "job")
    assert list(target.parent.iterdir()) == [target]


@in_turn("name", NAMES)
def test_disk_full_keeps_old_file(tmp_path: Path, name: str) -> None:
    """A full disk is reported and keeps the old file; the answers are in the ledger."""
    target = tmp_path / name
    target.write_text("the old one")
    with (
        limit_file_size(1000),
        pytest.raises(CommandRefused, match=f"{name}: the output cannot be written: .*File too large"),
    ):
        write_output(target, [os.urandom(50).hex() for _ in range(500)])
    assert target.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [target]


@in_turn("name", NAMES)
def test_output_permissions(tmp_path: Path, name: str) -> None:
    """The output is 0600 (personal data), even when the old file or a leftover part was open to all."""
    target = tmp_path / name
    target.write_text("old")
    target.chmod(0o644)
    temporary_path(target, "job").write_text("stale")
    write_output(target, ["x"])
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [target]


def test_folder_without_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that can be written but not listed is enough: the file is there, so no error says otherwise."""
    real_open = os.open

    def refuse_folder(path: Path, flags: int, mode: int = 0o777) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse_folder)
    assert read_cells(write_output(tmp_path / "out.csv", ["x"])) == [["old", "new"], ["x", "x"]]


def test_leftover_parts_are_removed(tmp_path: Path) -> None:
    """Leftover parts are removed whatever date the next output's name has; other files are untouched."""
    temporary_path(tmp_path / "out-2026-10-31.csv", "job").write_text("stale")
    other = temporary_path(tmp_path / "out.csv", "other")
    other.write_text("another job's")
    prepare_file(tmp_path / "out-2026-11-01.csv", tmp_path / "leads.csv", "job")
    assert list(tmp_path.iterdir()) == [other]


def test_concurrent_jobs_do_not_mix_parts(tmp_path: Path) -> None:
    """When another run has replaced our part, ours fails instead of publishing the other's."""
    target = tmp_path / "out.csv"
    frame = pl.DataFrame({"old": ["x"], "new": ["y"]})

    def frames() -> Iterator[pl.DataFrame]:
        yield frame
        temporary_path(target, "job").unlink()
        temporary_path(target, "job").write_text("theirs, half")

    with pytest.raises(CommandRefused, match="another run of a job with this name"):
        write_file(target, Output(path="out.csv"), job="job", schema=frame.schema, frames=frames(), new_columns=1)
    assert not target.exists()


def test_missing_folders_are_created(tmp_path: Path) -> None:
    """Missing folders are created at the start, not at the end of the run."""
    target = tmp_path / "a/b/out.csv"
    prepare_file(target, tmp_path / "leads.csv", "job")
    write_output(target, ["x"])
    assert target.exists()


def test_output_never_replaces_input(tmp_path: Path) -> None:
    """The output never replaces the input under any of its names: same path, symbolic link, hard link or `..`."""
    leads = tmp_path / "leads.csv"
    leads.write_text("A\n1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "soft.csv").symlink_to(leads)
    (tmp_path / "hard.csv").hardlink_to(leads)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("leads.csv", "folder/../leads.csv", "./leads.csv", "soft.csv", "hard.csv", "link/leads.csv"):
        (tmp_path / "job.yaml").write_text(f"{JOB}output: {name}\nparams: {{a: A}}\n")
        job = load_job(tmp_path / "job.yaml")
        with pytest.raises(JobError, match="the output would replace the input"):
            prepare_file(tmp_path / job.output.path, job.input_path, job.name)
    assert leads.read_text() == "A\n1\n"


def test_output_never_replaces_ledger(tmp_path: Path) -> None:
    """The output never replaces this job's or another job's ledger, which records what was paid for."""
    path = tmp_path / "memory.csv"
    Database(path).close()
    with pytest.raises(JobError, match="the output would replace a ledger"):
        prepare_file(path, tmp_path / "leads.csv", "job")


@in_turn("name", ["file/out.csv", "file/out/", "folder.csv", f"{'x' * 300}.csv"])
def test_invalid_output_refused_before_spending(tmp_path: Path, name: str) -> None:
    """An invalid output path is refused before anything is spent: file for folder, folder for file, name too long."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(CommandRefused, match="the output cannot be written") as caught:
        prepare_file(parse_location(tmp_path, name), tmp_path / "leads.csv", "job")
    assert caught.value.hint == UNWRITABLE_HINT


FORMULAS = [
    "=1",
    "=cmd|'/c calc'!A0",
    "@x",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "-x",
    "+x",
    "-",
    "+",
    "-2+3",
    "+49 30 1234 x",
    "-5e",
    "-5e3+1",
]
FORMULAS += ["\n=1+1", "\r\n+x", "\u200b=1", "\ufeff@x", "\uff1d1+1", "\uff20x", "\uff0bx", "\uff0dx", "\n\u2060-x"]
FORMULAS += ["- item", "+1;=1", "+1\n=cmd()", "--5", "+(x)", "=", "-A1", "-5%"]
HARMLESS_CELLS = [
    "+49 30 1234",
    "-5",
    "+1 (202) 555-0100 ext. 5",
    "+1 202.555.0100 x12",
    "+49 (0)30/1234-5",
    "-5.25",
    "-1,000",
    "-5e3",
    "-1.5E-05",
]
HARMLESS_CELLS += ["+1-202-555-0100", "5", "x=1", " =1", "a@b.c", "'=1", "ada", "", "1-2", "(1)", "null"]


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz"])
def test_formula_injection_is_escaped(tmp_path: Path, name: str) -> None:
    """A new value that is a formula gets an apostrophe; numbers, phones and all input cells are unchanged."""
    path = write_output(tmp_path / name, [*FORMULAS, *HARMLESS_CELLS])
    if name.endswith(".gz"):
        path = path.with_suffix("")
        path.write_bytes(gzip.decompress((tmp_path / name).read_bytes()))
    assert read_cells(path) == [
        ["old", "new"],
        *([value, "'" + value] for value in FORMULAS),
        *([value, value] for value in HARMLESS_CELLS),
    ]


def test_parquet_values_are_not_escaped(tmp_path: Path) -> None:
    """Parquet values are not escaped, because nothing evaluates them: values and types stay, and null is null."""
    path = write_output(tmp_path / "out.parquet", [*FORMULAS, None])
    assert pl.read_parquet(path)["new"].to_list() == [*FORMULAS, None]
    path = write_output(tmp_path / "credits.parquet", [1.5, None, 0.0], pl.Float64)
    assert pl.read_parquet(path)["new"].to_list() == [1.5, None, 0.0]


def test_number_formatting(tmp_path: Path) -> None:
    """Numbers have no exponent and no trailing zeros, up to a millionth; unknown is blank."""
    path = write_output(tmp_path / "out.csv", [0.0, 1.0, 2.5, 0.000001, 1234567.0, 0.3, 100.0, None], pl.Float64)
    assert [row[1] for row in read_cells(path)[1:]] == ["0", "1", "2.5", "0.000001", "1234567", "0.3", "100", ""]


@in_turn(("separator", "encoding"), [(";", "cp1252"), ("\t", "utf-16"), ("|", "utf-8-sig"), (",", "utf-8")])
def test_output_separator_and_encoding(tmp_path: Path, separator: str, encoding: str) -> None:
    """A value with the separator is quoted, and the byte order mark that spreadsheets need is written."""
    values = [f"Größe{separator}1,5", '"', "a\r\nb", "a\rb"]
    path = write_output(tmp_path / "out.csv", values, separator=separator, encoding=encoding)
    assert read_cells(path, encoding, separator) == [["old", "new"], *([value, value] for value in values)]


def test_unencodable_character(tmp_path: Path) -> None:
    """A character that the encoding lacks, which a run refuses or replaces before, never becomes a question mark."""
    target = tmp_path / "out.csv"
    with pytest.raises(UnicodeEncodeError):
        write_output(target, ["ö", "日本"], encoding="cp1252")
    assert not target.exists()


@in_turn(
    ("value", "text"),
    [
        ("ada@x.example", "ada@x.example"),
        (" padded ", " padded "),
        (5, "5"),
        (1.5, "1.5"),
        (0, "0"),
        (True, "true"),
        (False, "false"),
        (["a", "ö"], '["a", "ö"]'),
        ({"a": None}, '{"a": null}'),
        (None, None),
        ("", None),
        (" ", None),
        ([], None),
        ({}, None),
    ],
)
def test_result_value_as_cell(value: object, text: str | None) -> None:
    """Text stays text, other values become JSON, and no value is blank."""
    assert to_cell(value) == text


# The collector


def write_job_and_leads(folder: Path, leads: Sequence[Sequence[str]], job: str) -> tuple[JobInput, RequestTemplate]:
    """Write a job and its leads, header first."""
    with (folder / "leads.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(leads)
    (folder / "job.yaml").write_text(JOB + job, encoding="utf-8")
    loaded = load_job(folder / "job.yaml")
    return JobInput(loaded), RequestTemplate(CALL, ("a",), (), loaded.model.columns or {"email": "email"}, None)


def enroll_and_settle(
    ledger: Database, rows: JobInput, template: RequestTemplate, tasks: Sequence[dict[str, Any] | None]
) -> None:
    """Enroll all rows and settle the distinct requests in order with these tasks; None leaves one pending."""
    with ledger.transaction():
        execution = records.start_execution(ledger, "job", None, 0)
        enroll.begin_pass(ledger)
        for batch in rows.batches(template):
            enroll.enroll(ledger, template.target, batch.requests(), DEFAULT_SELECTION)
        queue.fill_queue(ledger, DEFAULT_SELECTION)
        for number, task in enumerate(tasks):
            (claim,) = queue.claim(ledger, execution, 0, 0)
            if task is None:
                transitions.record_refused(ledger, [(claim.attempt_id, "not now", 0)])
                return
            transitions.record_accepted(ledger, [(claim.attempt_id, f"t-{number}", 0)], {})
            written = json.dumps(task, ensure_ascii=False)
            answer = read_answer(TaskReply(task, written), task_phase(task), tuple(template.columns.values()))
            transitions.settle(ledger, [(claim.attempt_id, answer, 1_793_534_400_000)], execution, 1)


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Database]:
    """Open a ledger."""
    opened = Database(tmp_path / "ledger.db")
    yield opened
    opened.close()


def test_rows_get_answer_and_status(tmp_path: Path, open_ledger: Database) -> None:
    """Rows with the same request share its answer; its cost is shown once, on the first of them."""
    leads = [["A", "Skip"], ["ada", ""], ["bob", ""], [" ada", ""], ["", ""], ["x", "yes"], ["cyd", ""], ["dan", ""]]
    job = "params: {a: A}\nonly_if_empty: [Skip]\ncolumns: {mail: email, more: person.tags}\n"
    rows, template = write_job_and_leads(tmp_path, leads, job)
    steps = [{"provider": "Mailhound", "cost": "1"}]
    tasks: list[dict[str, Any] | None] = [
        {
            "status": "completed",
            "credits_spent": 1.5,
            "data": {"result": {"email": "=a@b.c", "person": {"tags": ["x"]}}, "steps": steps},
        },
        {"status": "completed", "credits_spent": 0, "data": None},
        {"status": "failed", "error": ["-boom", "bang"], "credits_spent": None},
        None,
    ]
    enroll_and_settle(open_ledger, rows, template, tasks)
    target = tmp_path / "out.csv"

    counted = Collector(open_ledger, template, rows).write(target)

    at = "2026-11-01T12:00:00Z"
    assert read_cells(target) == [
        ["A", "Skip", "mail", "more", *STATUS],
        ["ada", "", "'=a@b.c", '["x"]', "found", "", "Mailhound", "1.5", "t-0", at],
        ["bob", "", "", "", "not_found", "", "", "0", "t-1", at],
        [" ada", "", "'=a@b.c", '["x"]', "found", "", "Mailhound", "", "t-0", at],
        ["", "", "", "", "invalid", "a blank (A)", "", "", "", ""],
        ["x", "yes", "", "", "filtered", "", "", "", "", ""],
        ["cyd", "", "", "", "failed", "'-boom; bang", "", "", "t-2", at],
        ["dan", "", "", "", "pending", "not now", "", "", "", ""],
    ]
    assert counted.statuses == {
        RowStatus.FOUND: 2,
        RowStatus.NOT_FOUND: 1,
        RowStatus.INVALID: 1,
        RowStatus.FILTERED: 1,
        RowStatus.FAILED: 1,
        RowStatus.PENDING: 1,
    }
    assert counted.filled_by_column == {"mail": 2, "more": 2}
    assert Collector(open_ledger, template, rows).count_rows() == counted


def test_long_answers_make_batches_smaller(
    tmp_path: Path, open_ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with long answers are read in smaller batches, so that memory is bounded. The output is the same."""
    leads = [["A"], *([f"lead {number % 40}"] for number in range(50))]
    rows, template = write_job_and_leads(tmp_path, leads, "params: {a: A}\ncolumns: {mail: email}\n")
    results = [{"email": f"{number}@b.c", "bio": "x" * 10_000} for number in range(40)]
    tasks: list[dict[str, Any] | None] = [
        {"status": "completed", "credits_spent": 1, "data": {"result": result, "steps": []}} for result in results
    ]
    enroll_and_settle(open_ledger, rows, template, tasks)
    collector = Collector(open_ledger, template, rows)
    collector.write(tmp_path / "whole.csv")
    assert [joined.batch.frame.height for joined in collector.joined_batches()] == [50]

    monkeypatch.setattr(queries, "MAX_ANSWER_CHARACTERS", 110_000)

    assert [joined.batch.frame.height for joined in collector.joined_batches()] == [10] * 5
    counted = collector.write(tmp_path / "parts.csv")
    assert counted.statuses == {RowStatus.FOUND: 50}
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


#: Cells that are blank, equal, or need quotes in some way.
CELLS = st.sampled_from(
    ["ada", "Ada", " ada", "ada\u200b", "\ufeffada", "", " ", "\u200b", "-", "N/A", 'a\n"b", c', "é", "e\u0301", "=1+1"]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)


@given(cells=st.lists(CELLS, min_size=1, max_size=12), batch_size=st.integers(1, 5), rng=st.randoms())
@settings(max_examples=examples(30), deadline=None)
def test_output_does_not_depend_on_ledger_order(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str], batch_size: int, rng: random.Random
) -> None:
    """Answers are found in any ledger: with the leads in the file's order, shuffled, or beside those of other files."""
    folder = tmp_path_factory.mktemp("order")
    job = "params: {a: A}\ncolumns: {mail: email}\n"
    rows, template = write_job_and_leads(folder, [["A", "B"], *([cell, "b"] for cell in cells)], job)
    others = [*cells, *(f"other {number}" for number in range(4))]
    rng.shuffle(others)
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "ROWS_PER_BATCH", batch_size)
        for name, enrolled in (("same", cells), ("shuffled", others)):
            with closing(Database(folder / f"{name}.db")) as ledger:
                frame = pl.DataFrame({"A": enrolled, "B": ["b"] * len(enrolled)})
                settle_by_params(ledger, rows.for_frame(0, frame), template)
                enroll.begin_pass(ledger)
                in_batches = rows.for_frame(0, pl.DataFrame({"A": cells, "B": ["b"] * len(cells)}))
                collector = Collector(ledger, template, in_batches, selection=DEFAULT_SELECTION)
                collector.write(folder / f"{name}.csv")
            outputs.append((folder / f"{name}.csv").read_bytes())

    assert outputs[0] == outputs[1]
    mails = [row[2] for row in read_cells(folder / "same.csv")[1:]]
    sent = [
        None if text is None else json.loads(text)["a"] for batch in rows.batches(template) for text in batch.params
    ]
    assert mails == [f"{text.encode().hex()}@c.example" if text else "" for text in sent]


def settle_by_params(ledger: Database, rows: JobInput, template: RequestTemplate) -> None:
    """Enroll all rows and settle each request with an answer that depends on what it sends."""
    with ledger.transaction():
        execution = records.start_execution(ledger, "job", None, 0)
        enroll.begin_pass(ledger)
        for batch in rows.batches(template):
            enroll.enroll(ledger, template.target, batch.requests(), DEFAULT_SELECTION)
        queue.fill_queue(ledger, DEFAULT_SELECTION)
        while claims := queue.claim(ledger, execution, 0, 0):
            for claim in claims:
                name = json.loads(claim.params)["a"].encode().hex()
                transitions.record_accepted(ledger, [(claim.attempt_id, f"t-{name}", 0)], {})
                raw = json.dumps({"data": [{"result": {"email": f"{name}@c.example"}, "steps": []}]})
                answer = Answer(State.FOUND, provider="Mailhound", credits=1, raw=raw)
                transitions.settle(ledger, [(claim.attempt_id, answer, 1_793_534_400_000)], execution, 1)


def test_other_columns_from_stored_answers(tmp_path: Path, open_ledger: Database) -> None:
    """Other columns come from the stored answers at no cost, because the ledger keeps whole answers."""
    rows, template = write_job_and_leads(tmp_path, [["A"], ["ada"]], "params: {a: A}\ncolumns: {mail: email}\n")
    enroll_and_settle(
        open_ledger, rows, template, [{"status": "completed", "data": [{"email": None, "phone": "+49 30"}]}]
    )
    assert Collector(open_ledger, template, rows).count_rows().statuses == {RowStatus.NOT_FOUND: 1}
    other = RequestTemplate(CALL, (), (), {"phone": "phone"}, None)
    assert Collector(open_ledger, other, rows).count_rows().statuses == {RowStatus.FOUND: 1}


@pytest.mark.parametrize("value", [5, 0, 1.5, True, "x", ["a"], {"b": 1}, "日本", 'a\nb,"c"', "null", "a\u2028b"])
@pytest.mark.parametrize("name", first_quick(1, ["out.csv", "out.parquet"]))
def test_result_values_of_any_type(tmp_path: Path, open_ledger: Database, name: str, value: object) -> None:
    """New columns are text, whatever types the API returns."""
    rows, template = write_job_and_leads(tmp_path, [["A"], ["ada"]], "params: {a: A}\n")
    enroll_and_settle(open_ledger, rows, template, [{"status": "completed", "data": {"email": value}}])
    target = tmp_path / name
    Collector(open_ledger, template, rows).write(target)
    found = pl.read_parquet(target)["email"].to_list() if name.endswith("parquet") else [read_cells(target)[1][1]]
    assert found == [value if isinstance(value, str) else json.dumps(value)]


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz", "out.parquet"])
def test_empty_input_gives_empty_output(tmp_path: Path, open_ledger: Database, name: str) -> None:
    """An empty input gives an empty output with all columns and types, so the next step of a pipeline works."""
    rows, template = write_job_and_leads(tmp_path, [["A", ""]], "params: {a: A}\n")
    assert Collector(open_ledger, template, rows).write(tmp_path / name).statuses == {}
    columns = ["A", "", "email", *STATUS]
    if name.endswith(".parquet"):
        schema = pl.read_parquet_schema(tmp_path / name)
        assert list(schema) == columns
        assert schema["enrich_credits"] == pl.Float64
    else:
        data = (tmp_path / name).read_bytes()
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
        assert text == ",".join(columns) + "\n"


def test_output_as_next_input(tmp_path: Path, open_ledger: Database) -> None:
    """In an output used as input, the status columns are replaced, not added again."""
    rows, template = write_job_and_leads(tmp_path, [["A"], ["ada"]], "params: {a: A}\ncolumns: {mail: email}\n")
    enroll_and_settle(open_ledger, rows, template, [{"status": "completed", "data": {"email": "x"}}])
    Collector(open_ledger, template, rows).write(tmp_path / "first.csv")
    job = "params: {a: A}\ncolumns: {again: email}\n"
    rows, template = write_job_and_leads(tmp_path, read_cells(tmp_path / "first.csv"), job)
    Collector(open_ledger, template, rows).write(tmp_path / "second.csv")
    header, row = read_cells(tmp_path / "second.csv")
    assert header == ["A", "mail", "again", *STATUS]
    assert row[:4] == ["ada", "x", "x", "found"]


def test_interrupt_between_batches_keeps_old_file(tmp_path: Path, open_ledger: Database) -> None:
    """`check` is called before each batch; an interrupt there keeps the old file."""

    def check() -> None:
        raise InterruptedByTestError

    rows, template = write_job_and_leads(tmp_path, [["A"], ["ada"]], "params: {a: A}\n")
    target = tmp_path / "out.csv"
    target.write_text("old")
    with pytest.raises(InterruptedByTestError):
        Collector(open_ledger, template, rows, check).write(target)
    assert target.read_text() == "old"


def test_input_error_keeps_old_file(tmp_path: Path, open_ledger: Database) -> None:
    """An error in the input keeps the old file and is reported as an input error."""
    rows, template = write_job_and_leads(tmp_path, [["A", "B"], ["a", "b"], ["c"]], "params: {a: A}\n")
    target = tmp_path / "out.parquet"
    with pytest.raises(EnrichError, match="row 2"):
        Collector(open_ledger, template, rows).write(target)
    assert not target.exists()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    [
        "007",
        "+49 30 1",
        "=1+1",
        " a ",
        '"',
        '""',
        ",",
        "\r",
        "\n",
        "\r\n",
        "'",
        "NULL",
        "1e5",
        "\ufeff",
        "\x1a",
        "\u2028",
        "ä",
    ]
)
#: A header begins with a letter: a byte order mark before the first name would be the file's own.
NAME = TEXT.map("h".__add__) | st.sampled_from(["", " ", "^h.*$", "*", "column_0", "wanted", "literal", "a.b"])


@st.composite
def output_tables(draw: st.DrawFn) -> list[list[str]]:
    """Draw a header and rows of its width."""
    header = draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
    width = len(header)
    return [header, *draw(st.lists(st.lists(TEXT, min_size=width, max_size=width), max_size=6))]


@pytest.mark.long
@given(table=output_tables())
@settings(deadline=None)
@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_input_cells_are_preserved(tmp_path_factory: pytest.TempPathFactory, name: str, table: list[list[str]]) -> None:
    """Any text in any cell under any name is preserved exactly and in order, with the new columns behind."""
    folder = tmp_path_factory.getbasetemp()
    ledger = Database(folder / "cells.db")
    try:
        rows, template = write_job_and_leads(folder, table, "params: {a: {value: x}}\n")
        counted = Collector(ledger, template, rows).write(folder / name)
    finally:
        ledger.close()
    if name.endswith(".parquet"):
        frame = pl.read_parquet(folder / name)
        back = [frame.columns, *map(list, frame.rows())]
    else:
        back = read_cells(folder / name)
    width = len(table[0])
    assert back[0] == [*table[0], "email", *STATUS]
    assert [row[:width] for row in back] == table
    assert counted.statuses.total() == len(table) - 1
    assert {row[width + 1] for row in back[1:]} <= {State.PENDING.value}
