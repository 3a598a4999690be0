"""The input in parts: each can be read alone and elsewhere, and together they equal the whole."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.errors import CommandRefused, Interrupted
from enrich.exit_codes import ExitCode
from enrich.files import reader
from enrich.files.input_files import LocalCopies
from enrich.files.reader import InputPart, read_part
from enrich.job.job import load_job
from enrich.job.spec import Caps
from enrich.job.target import Target, TargetKind
from enrich.ledger.erasure import ForgottenRequests, keyed_hash
from enrich.rows.batches import RowBatch
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.step_batch import capped_rows
from tests.support.cases import in_turn
from tests.support.object_storage import BUCKET, put_object
from tests.support.table_files import input_parts, write_table

TEMPLATE = RequestTemplate(Target(TargetKind.WATERFALL, "email_getter", (833,)), ("a",), (), {"new": "email"}, None)
JOB = "version: 1\nwaterfall: email_getter\nparams: {a: A, b: B}\n"


def open_rows(
    folder: Path, input_path: str = "leads/", more: str = "", forgotten: ForgottenRequests | None = None
) -> JobInput:
    """Open the leads of a job."""
    (folder / "job.yaml").write_text(f"{JOB}input: {input_path}\n{more}")
    return JobInput(load_job(folder / "job.yaml"), forgotten)


def batches_of(rows: JobInput, part: InputPart) -> Iterator[RowBatch]:
    """Read a part as another process does, which has the input without its rows."""
    sample, first = pickle_roundtrip(rows.without_rows()), part.first_position
    for frame in read_part(part, rows.full_table.input_schema, LocalCopies()):
        yield from sample.for_frame(first, frame).batches(TEMPLATE)
        first += frame.height


def described_rows(batches: Iterator[RowBatch]) -> list[tuple[object, ...]]:
    """Return what is known of each row: position, cells, and its request or the reason it has none."""
    return [
        row
        for batch in batches
        for row in zip(
            range(batch.first_position, batch.first_position + batch.frame.height),
            batch.frame.rows(),
            batch.fingerprints,
            batch.params,
            batch.statuses,
            batch.errors,
            batch.groups or [None] * batch.frame.height,
            strict=True,
        )
    ]


def pickle_roundtrip(rows: JobInput) -> JobInput:
    """Pickle and unpickle, as for another process."""
    copied: JobInput = pickle.loads(pickle.dumps(rows))  # noqa: S301 - pickled on this line
    return copied


CELL = st.sampled_from(["", "x", "y", "ada@x.example", 'a"b', "ö\n"])
FILE = st.tuples(st.sampled_from(["", "c=1/", "c=2/"]), st.lists(st.tuples(CELL, CELL), max_size=7))


@pytest.mark.long
@given(
    files=st.lists(FILE, min_size=1, max_size=4),
    kind=st.sampled_from(["parquet", "csv", "jsonl"]),
    size=st.integers(1, 4),
)
def test_parts_equal_whole_input(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, list[tuple[str, str]]]], kind: str, size: int
) -> None:
    """The parts give the same rows, positions and requests as the whole, for any files and part sizes."""
    folder = tmp_path_factory.mktemp("parts")
    # Either all files lie in partition folders, or none does.
    deep = bool(files[0][0])
    for number, (below, leads) in enumerate(files):
        path = folder / "leads" / ((below or "c=3/") if deep else "") / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, ["A", "B"], leads or ([["", ""]] if kind == "jsonl" else []))
    with patch.object(reader, "ROWS_PER_PART", size):
        rows = open_rows(folder, more="where: B <> 'y'\ncaps: {by: a, max: 1}\n")
        divided = input_parts(rows)
        whole = described_rows(rows.batches(TEMPLATE))
        assert sum(part.rows for part in divided) == len(whole)
        assert [row for part in divided for row in described_rows(batches_of(rows, part))] == whole
    if kind == "parquet":
        assert all(0 < part.rows <= size for part in divided)


def test_part_can_be_read_elsewhere(tmp_path: Path) -> None:
    """A part can be read without the job file and the suppression list, because both are pickled with it."""
    folder = tmp_path / "leads"
    folder.mkdir()
    people = [["Ada", "ada@x.example"], ["Bob", "bob@y.example"], ["Cyd", "cyd@z.example"]]
    for name, lead in zip("abc", people, strict=True):
        write_table(folder / f"{name}.csv", ["A", "B"], [lead])
    (tmp_path / "never.txt").write_text("x.example\n")
    forgotten = ForgottenRequests(b"key", frozenset([keyed_hash(b"key", b'{"a":"Bob","b":"bob@y.example"}')]))
    rows = open_rows(tmp_path, more="suppress: never.txt\n", forgotten=forgotten)
    whole, divided = described_rows(rows.batches(TEMPLATE)), input_parts(rows)
    for name in ("job.yaml", "never.txt", "leads/b.csv"):
        (tmp_path / name).unlink()
    assert [row[4] for row in whole] == ["filtered", "filtered", None]
    assert [row for part in (divided[0], divided[2]) for row in described_rows(batches_of(rows, part))] == [
        whole[0],
        whole[2],
    ]
    with pytest.raises(CommandRefused, match=f"{folder}/b.csv does not exist"):
        described_rows(batches_of(rows, divided[1]))


def test_part_errors_name_job_line(tmp_path: Path) -> None:
    """Errors in a part name the job file's line, even without that file, and quote no cell."""
    write_table(tmp_path / "leads.csv", ["A", "B"], [["x", "1"]])
    rows = open_rows(tmp_path, "leads.csv", "where: CAST(A AS INT) > 1\n")
    (part,) = input_parts(rows)
    (tmp_path / "job.yaml").unlink()
    with pytest.raises(Exception, match=r"job.yaml:5: where: cannot be computed") as caught:
        described_rows(batches_of(rows, part))
    assert "'x'" not in str(caught.value)


def test_in_memory_rows_keep_positions(tmp_path: Path) -> None:
    """Rows that a cluster brings in memory keep their positions."""
    write_table(tmp_path / "leads.csv", ["A", "B", "enrich_status"], [["x", "1", "found"], ["y", "2", "failed"]])
    rows = open_rows(tmp_path, "leads.csv", "where: enrich_status = 'failed'\n")
    frame = pl.DataFrame({"A": ["y"], "B": ["2"], "enrich_status": ["failed"]})
    assert (
        described_rows(pickle_roundtrip(rows.for_frame(1, frame)).batches(TEMPLATE))
        == described_rows(rows.batches(TEMPLATE))[1:]
    )


@in_turn(("kind", "rows"), [("parquet", 0), ("parquet", 2), ("csv", 0), ("csv", 2), ("csv", 4)])
def test_changed_row_count_is_refused(tmp_path: Path, kind: str, rows: int) -> None:
    """A changed row count is refused, because later rows would have other positions."""
    path = write_table(tmp_path / f"leads.{kind}", ["A", "B"], [["1", "2"]] * 3)
    whole = open_rows(tmp_path, path.name)
    (part,) = input_parts(whole)
    write_table(path, ["A", "B"], [["1", "2"]] * rows)
    with pytest.raises(CommandRefused, match=rf"leads.{kind} changed since the run began"):
        described_rows(batches_of(whole, part))


def test_undividable_inputs(tmp_path: Path) -> None:
    """Requests that depend on other rows are not enrolled in parts."""
    write_table(tmp_path / "leads.csv", ["A", "B"], [])
    inputs = [open_rows(tmp_path, "leads.csv", more) for more in ("", "dedupe: false\n", "order_by: A\n")]
    assert [job_input.can_be_enrolled_in_parts for job_input in inputs] == [True, False, False]


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_parts_of_objects(tmp_path: Path) -> None:
    """A part of an object is downloaded where it is read; an object changed since the start is refused."""
    leads = [[str(number), "x"] for number in range(5)]
    data = write_table(tmp_path / "a.parquet", ["A", "B"], leads).read_bytes()
    for name in ("in/c=1/a.parquet", "in/c=2/a.parquet"):
        put_object(name, data)
    rows = open_rows(tmp_path, f"s3://{BUCKET}/in/")
    with patch.object(reader, "ROWS_PER_PART", 2):
        divided = input_parts(rows)
    assert [(part.first_position, part.rows) for part in divided] == [(0, 2), (2, 2), (4, 1), (5, 2), (7, 2), (9, 1)]
    whole = described_rows(rows.batches(TEMPLATE))
    assert [row for part in divided for row in described_rows(batches_of(rows, part))] == whole
    put_object(
        "in/c=2/a.parquet", write_table(tmp_path / "a.parquet", ["A", "B"], [*leads[:4], ["9", "9"]]).read_bytes()
    )
    with pytest.raises(CommandRefused, match=r"c=2/a.parquet changed since the run began"):
        described_rows(batches_of(rows, divided[-1]))


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("name", ["leads.parquet", "leads[1].parquet"])
def test_replaced_object_is_detected(tmp_path: Path, name: str) -> None:
    """A replaced object is detected even with as many rows: the output would mix the old and the new one."""
    data = write_table(tmp_path / "a.parquet", ["A", "B"], [["1", "x"]] * 4).read_bytes()
    put_object(name, data)
    rows = open_rows(tmp_path, f"s3://{BUCKET}/{name}")
    with patch.object(reader, "ROWS_PER_PART", 2):
        first, second = input_parts(rows)
    assert len(described_rows(batches_of(rows, first))) == 2
    put_object(name, write_table(tmp_path / "a.parquet", ["A", "B"], [["9", "y"]] * 4).read_bytes())
    with pytest.raises(CommandRefused, match=rf"{re.escape(name)} changed since the run began"):
        described_rows(batches_of(rows, second))


def test_row_counting_reads(tmp_path: Path) -> None:
    """Counting the rows of Parquet files reads no rows, because their metadata has the count."""
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / "leads").mkdir(exist_ok=True)
        write_table(tmp_path / "leads" / name, ["A", "B"], [["1", "2"]] * 3)
    rows = open_rows(tmp_path)
    with patch.object(reader, "_read_batches", side_effect=AssertionError):
        assert [
            (part.file.location.name, part.start_row, part.rows, part.first_position) for part in input_parts(rows)
        ] == [
            ("a.parquet", 0, 3, 0),
            ("b.parquet", 0, 3, 3),
        ]


def test_reading_the_send_order_can_be_stopped(tmp_path: Path) -> None:
    """A signal ends the passes of the input for `order_by` and `caps` before the next batch."""
    (tmp_path / "leads").mkdir()
    for name in ("a.parquet", "b.parquet"):
        write_table(tmp_path / "leads" / name, ["A", "B"], [["1", "2"]])
    calls = []

    def stop_at(number: int) -> Callable[[], None]:
        def check_stopped() -> None:
            calls.append(number)
            if len(calls) == number:
                raise Interrupted(ExitCode.TERMINATED)

        return check_stopped

    rows = open_rows(tmp_path, more="order_by: A\n")
    with pytest.raises(Interrupted):
        rows.queue_order(stop_at(2))
    calls.clear()
    with pytest.raises(Interrupted):
        capped_rows(rows, Caps(by="A", max=1), bytearray(), stop_at(4))
    assert len(calls) == 4
