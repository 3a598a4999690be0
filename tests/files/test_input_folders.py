"""Leads in a folder of files whose subfolders may name columns, on disk and in object storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest

from enrich.errors import CommandRefused
from enrich.files import input_files, object_store, parquet_dataset
from enrich.files.input_files import find_paths
from enrich.files.reader import InputTable
from enrich.files.writer import write_file
from enrich.job.job import load_job
from enrich.job.local_files import inclusion_problem
from enrich.job.locations import ObjectUrl
from enrich.job.spec import Input, Output
from tests.support.cases import in_turn
from tests.support.object_storage import BUCKET, put_object
from tests.support.table_files import INPUTS, write_table
from tests.support.workspace import HEADER, SandboxApi, Workspace, make_leads

ROWS = [["1", "2"], ["3", "4"], ["5", "6"]]


def write_files(folder: Path, *names: str) -> Path:
    """Write a file of one row for each name; return the folder."""
    for name, row in zip(names, ROWS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_table(folder / name, ["A", "B"], [row])
    return folder


def open_input(location: Path | ObjectUrl, **options: str) -> InputTable:
    """Open an input."""
    return InputTable(location, Input.model_validate({"path": str(location), **options}))


def read_rows(location: Path | ObjectUrl, **options: str) -> list[tuple[Any, ...]]:
    """Read all rows."""
    return [row for frame in open_input(location, **options).batches() for row in frame.rows()]


def read_error(location: Path | ObjectUrl) -> CommandRefused:
    """Return the error of an input that can't be read."""
    with pytest.raises(CommandRefused) as caught:
        read_rows(location)
    return caught.value


@in_turn("ending", INPUTS)
def test_folder_includes_all_files(tmp_path: Path, ending: str) -> None:
    """A folder includes all files in the order of their paths, except hidden ones and those that begin with `_`."""
    folder = write_files(tmp_path / "leads", f"b/1.{ending}", f"b.{ending}", f"c/d/e.{ending}")
    for name in (f"_x.{ending}", f".x.{ending}", "_SUCCESS", f"_old/x.{ending}", f".tmp/x.{ending}"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("?")
    assert read_rows(folder) == [("1", "2"), ("3", "4"), ("5", "6")]


def test_partition_columns(tmp_path: Path) -> None:
    """Partition folders become text columns after the file's own, in Hive's notation; no value is null."""
    names = ("country=DE/day=1/a.csv", "country=FR%2FGP/day=2/a.csv", "country=__HIVE_DEFAULT_PARTITION__/day=/a.csv")
    folder = write_files(tmp_path / "year=2026", *names)
    source = open_input(folder)
    assert list(source.schema.items()) == [(name, pl.String()) for name in ("A", "B", "country", "day")]
    assert read_rows(folder) == [("1", "2", "DE", "1"), ("3", "4", "FR/GP", "2"), ("5", "6", None, "")]
    assert [row[2:] for row in read_rows(folder / "country=*" / "day=*" / "a.csv")] == [
        row[2:] for row in read_rows(folder)
    ]
    assert read_rows(folder / "country=DE") == [("1", "2", "1")]


@in_turn("folder", ["x=%00", "a%00b=x", "x=%FF", "x=a%ed%a0%80", "x=\udcff"])
def test_partition_that_is_no_text(tmp_path: Path, folder: str) -> None:
    """A folder name that is no UTF-8 text, or has a NUL, is refused: no output could have it."""
    write_files(tmp_path / "leads", f"{folder}/a.csv")
    error = read_error(tmp_path / "leads")
    assert error.message == f"{tmp_path}/leads/{folder}/a.csv: the name of a folder is not text"
    assert error.hint == "write it in UTF-8, also its percent codes, and without NUL"


@in_turn("ending", ["csv", "jsonl", "parquet"])
def test_file_column_overrides_partition(tmp_path: Path, ending: str) -> None:
    """A column in the file comes before the partition folder of the same name; Spark writes both."""
    folder = write_files(tmp_path / "leads", f"B=x/a.{ending}", f"B=y/a.{ending}")
    assert read_rows(folder) == [("1", "2"), ("3", "4")]


def test_inconsistent_partition_columns(tmp_path: Path) -> None:
    """Inconsistent partition columns are refused: their blank cells would be sent as requests."""
    folder = write_files(tmp_path / "leads", "c=1/a.csv", "c=2/d=3/a.csv")
    result = read_error(folder)
    assert result.message == (f"{folder}/c=2/d=3/a.csv: its folders name `c=` / `d=`, those of {folder}/c=1/a.csv `c=`")


def test_duplicate_partition_columns(tmp_path: Path) -> None:
    """Duplicate partition columns are refused, because it is unclear which one counts."""
    folder = write_files(tmp_path / "leads", "c=1/c=2/a.csv")
    assert read_error(folder).message == f"{folder}/c=1/c=2/a.csv: its folders have a column twice: `c=` / `c=`"


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    """With mixed formats, the stray file is named, unless the job sets the format."""
    folder = write_files(tmp_path / "leads", "a.parquet", "b.csv")
    assert read_error(folder).message == f"{folder}/b.csv is CSV text, but {folder}/a.parquet is not"
    folder = write_files(tmp_path / "exports", "a.txt", "b.dat")
    assert read_rows(folder, format="csv") == [("1", "2"), ("3", "4")]


def test_different_headers_are_refused(tmp_path: Path) -> None:
    """Different headers are refused with both file names and the difference."""
    folder = write_files(tmp_path / "leads", "a.csv")
    write_table(folder / "b.csv", ["A", "C"], [])
    assert read_error(folder).message == (
        f"{folder}/b.csv: its header differs from that of {folder}/a.csv: `B` is missing, `C` is new"
    )


def test_empty_folder_is_refused(tmp_path: Path, workspace: Workspace, api: SandboxApi) -> None:
    """An empty folder is exit 5 and spends nothing: the export may not have arrived yet."""
    (workspace.folder / "leads").mkdir()
    (workspace.folder / "leads" / "_SUCCESS").touch()
    for named in ("leads", "leads/"):
        workspace.write_job(input=named)
        result = workspace.run_in_process("run", "job.yaml", api=api)
        assert (result.exit_code, result.stderr.splitlines()[0]) == (
            5,
            f"error: {workspace.folder}/leads has no files in it",
        )
    assert read_error(tmp_path / "none").message == f"{tmp_path}/none does not exist"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_subfolder_is_refused(tmp_path: Path) -> None:
    """An unreadable subfolder is refused by name instead of skipping its rows."""
    folder = write_files(tmp_path / "leads", "a.csv", "b/c.csv")
    (folder / "b").chmod(0)
    try:
        assert read_error(folder).message == f"{folder}/b cannot be read: Permission denied"
    finally:
        (folder / "b").chmod(0o700)


def test_added_or_removed_file_is_detected(tmp_path: Path) -> None:
    """Adding, removing or changing a file is detected, and so is moving one to another partition."""
    folder = write_files(tmp_path / "leads", "c=1/a.csv", "c=2/a.csv")
    source = open_input(folder)
    before, digest = source.file_versions(), source.digest()
    assert (source.file_versions(), open_input(folder).digest()) == (before, digest)
    (folder / "c=2").rename(folder / "c=3")
    assert source.file_versions() != before
    assert open_input(folder).digest() != digest
    (folder / "c=3").rename(folder / "c=2")
    assert source.file_versions() == before
    write_table(folder / "c=2" / "a.csv", ["A", "B"], [])
    assert source.file_versions() != before


def test_categories_are_not_quoted(tmp_path: Path) -> None:
    """The categories of an Enum, which are cells, are in no message."""
    for name in ("Ada", "Bob"):
        kind = pl.List(pl.Enum([name]))
        pl.DataFrame({"A": pl.Series([[name]], dtype=kind)}).write_parquet(tmp_path / f"{name}.parquet")
    message = read_error(tmp_path).message
    assert message.endswith("`A` is of a type with other categories")
    assert "[" not in message


@pytest.mark.long
def test_run_reads_folder(workspace: Workspace, api: SandboxApi) -> None:
    """A run reads a folder, a partition column can be a param, and a file added later pays only for its own rows."""
    for name in ("country=DE", "country=FR"):
        (workspace.folder / "in" / name).mkdir(parents=True)
    write_table(workspace.folder / "in" / "country=DE" / "a.csv", HEADER, make_leads(3))
    workspace.write_job(input="in/", where="country = 'DE'")
    assert workspace.run_job(api).submitted == 3
    write_table(workspace.folder / "in" / "country=DE" / "b.csv", HEADER, make_leads(2, start=2))
    write_table(workspace.folder / "in" / "country=FR" / "b.csv", HEADER, make_leads(2, start=7))
    summary = workspace.run_job(api)
    assert (summary.rows, summary.submitted, summary.reused) == (7, 1, 3)
    assert [row["country"] for row in workspace.read_output()] == ["DE"] * 5 + ["FR"] * 2
    assert [row["enrich_status"] == "filtered" for row in workspace.read_output()] == [False] * 5 + [True] * 2
    assert workspace.run_in_process("check", "job.yaml", api=api).exit_code == 0


def test_output_named_after_folder(tmp_path: Path) -> None:
    """The output is named after the folder and lies beside the job, as for a single file."""
    (tmp_path / "job.yaml").write_text("version: 1\nwaterfall: w\nparams: {a: A}\ninput: crm/leads/\n")
    assert load_job(tmp_path / "job.yaml").output.path == "leads_enriched.csv"
    text = (tmp_path / "job.yaml").read_text()
    (tmp_path / "job.yaml").write_text(text.replace("crm/leads/", "s3://crm/leads/"))
    assert load_job(tmp_path / "job.yaml").output.path == "leads_enriched.csv"


@in_turn(
    ("pattern", "name", "is_read"),
    [
        ("*.csv", "out.csv", True),
        ("*.csv", ".out.csv", False),
        ("*.csv", "~$out.csv", False),
        ("*.csv", "new/out.csv", False),
        ("*/*", "new/out.csv", True),
        ("*/*", ".enrich/job.csv", False),
        (".enrich/*", ".enrich/job.csv", True),
        ("new/[ab].csv", "new/b.csv", True),
    ],
)
def test_output_that_a_pattern_reads_is_refused(tmp_path: Path, pattern: str, name: str, *, is_read: bool) -> None:
    """A pattern reads no hidden file, and no file of an open workbook."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert (inclusion_problem(tmp_path / pattern, tmp_path / name, "output") is not None) is is_read
    assert (tmp_path / name in find_paths(tmp_path / pattern)) is is_read


def test_output_inside_input_folder_is_refused(tmp_path: Path) -> None:
    """An output inside the input folder is refused, except under a hidden name or one that begins with `_`."""
    folder = write_files(tmp_path / "leads", "a.csv")
    (tmp_path / "link").symlink_to(folder)
    for name in ("leads/out.csv", "leads/new/out.csv", "link/out.csv"):
        problem = inclusion_problem(folder, tmp_path / name, "output")
        assert problem is not None
        assert "the output would be read as input by the next run" in problem[0]
    for name in ("leads/_out/out.csv", "leads/.out.csv", "leads.csv"):
        assert inclusion_problem(folder, tmp_path / name, "output") is None


# In object storage


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_storage_prefix_includes_all_objects(tmp_path: Path) -> None:
    """A prefix includes all objects below it, as on disk, but not those whose name only starts the same."""
    for name, row in zip(("b/c=1/x.csv", "b/c=2/x.csv", "b2/c=3/x.csv"), ROWS, strict=True):
        put_object(name, write_table(tmp_path / "x.csv", ["A", "B"], [row]).read_bytes())
    put_object("b/_SUCCESS", b"?")
    put_object("b/.hidden/x.csv", b"?")
    for marker in ("b/e", "b/c=1/e_$folder$"):  # empty objects, as those of a folder that a console has made
        put_object(marker, b"")
    url = ObjectUrl("s3", BUCKET, "b/")
    assert read_rows(url) == [("1", "2", "1"), ("3", "4", "2")]
    assert read_rows(ObjectUrl("s3", BUCKET, "b*/c=*/x.csv")) == [
        (*row, str(place)) for place, row in enumerate(ROWS, 1)
    ]
    assert read_rows(ObjectUrl("s3", BUCKET, "b/c=[2-9]/*")) == [("3", "4", "2")]


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_object_name_with_glob_characters() -> None:
    """An object's name may contain glob characters."""
    put_object("leads[1].csv", b"A\n1\n")
    put_object("leads1.csv", b"A\n2\n")
    assert read_rows(ObjectUrl("s3", BUCKET, "leads[1].csv")) == [("1",)]


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_empty_storage_prefix_is_refused() -> None:
    """An empty prefix is refused with its URL."""
    assert read_error(ObjectUrl("s3", BUCKET, "none/")).message == f"s3://{BUCKET}/none/ has no files in it"
    assert read_error(ObjectUrl("s3", BUCKET, "none/*.csv")).message == f"s3://{BUCKET}/none/*.csv: no file matches"


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_changed_object_is_detected(tmp_path: Path) -> None:
    """A changed object is detected; each read downloads the object again, except the last one read."""
    for name in ("in/a.csv", "in/b.csv"):
        put_object(name, b"A\n1\n")
    source = open_input(ObjectUrl("s3", BUCKET, "in/"))
    before = source.file_versions()
    assert source.file_versions() == before
    put_object("in/a.csv", b"A\n2\n")
    assert source.file_versions() != before
    with pytest.raises(CommandRefused, match=f"s3://{BUCKET}/in/a.csv changed since the run began"):
        list(source.batches())
    put_object("in/c.csv", write_table(tmp_path / "c.csv", ["B"], []).read_bytes())
    assert read_error(ObjectUrl("s3", BUCKET, "in/")).message == (
        f"s3://{BUCKET}/in/c.csv: its header differs from that of s3://{BUCKET}/in/a.csv: `A` is missing, `B` is new"
    )


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv.gz"])
def test_storage_reads_only_metadata_first(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads only the columns and, for Parquet, the row count; it reads more only if that is not enough."""
    leads = [[os.urandom(8).hex(), "x"] for _ in range(500)]
    for name in ("in/a", "in/b"):
        put_object(f"{name}.{ending}", write_table(tmp_path / f"a.{ending}", ["A", "B"], leads).read_bytes())
    url = ObjectUrl("s3", BUCKET, "in/")
    monkeypatch.setattr(input_files, "HEAD_BYTES", 1000)
    with patch.object(object_store, "download", side_effect=AssertionError):
        source = open_input(url)
        one = open_input(ObjectUrl("s3", BUCKET, f"in/a.{ending}"))
    before = one.file_versions()
    with patch.dict(os.environ, AWS_ENDPOINT_URL="http://127.0.0.1:9"):
        assert one.file_versions() == before
    assert [row for frame in one.batches() for row in frame.rows()] == [tuple(row) for row in leads]
    assert list(source.schema) == ["A", "B"]
    assert list(source._known_row_counts.values()) == ([500, 500] if ending == "parquet" else [])
    assert [row for frame in source.batches() for row in frame.rows()] == [tuple(row) for row in leads * 2]
    header = ["A" * 2000, "B"]
    put_object(f"in/c.{ending}", write_table(tmp_path / f"a.{ending}", header, leads).read_bytes())
    assert read_error(url).message.startswith(f"s3://{BUCKET}/in/c.{ending}: its header differs")
    put_object(f"in/c.{ending}", b"PAR1" + b"\0" * 5000 + b"\xff\xff\xff\x7fPAR1")
    assert f"s3://{BUCKET}/in/c.{ending}" in read_error(url).message


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_dataset_manifest_selects_parts() -> None:
    """The manifest selects the parts: unfinished parts are ignored, and a missing part is an error."""
    target = ObjectUrl("s3", BUCKET, "out/")
    frame = pl.DataFrame({"A": ["x"], "enrich_index": [0]})
    write_file(target, Output(path="out/"), job="job", schema=frame.schema, frames=[frame], new_columns=1)
    parquet_dataset.begin_dataset(target, "job", frame.schema).write_part(0, [frame])
    assert read_rows(target) == [("x", 0)]
    (key,) = [leaf.location.key for leaf in open_input(target).input_files if isinstance(leaf.location, ObjectUrl)]
    object_store.delete_objects(target, [key])
    assert read_error(target).message == f"s3://{BUCKET}/out/ is incomplete, a part is missing: {key}"


@pytest.mark.long
def test_run_reads_storage_folder(
    workspace: Workspace, api: SandboxApi, bucket: dict[str, Any], tmp_path: Path
) -> None:
    """A run on a storage folder leaves nothing on disk and refuses an output inside that folder."""
    for number in range(3):
        put_object(
            f"in/{number}.parquet", write_table(tmp_path / "a.parquet", HEADER, make_leads(1, number)).read_bytes()
        )
    workspace.write_job(input=f"s3://{BUCKET}/in/")
    (workspace.folder / "tmp").mkdir()
    environ = bucket | {"TMPDIR": str(workspace.folder / "tmp")}
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api, **environ)
    assert (result.exit_code, result.json_output["submitted"], result.stderr) == (0, 3, "")
    assert [row["First Name"] for row in workspace.read_output()] == ["First0", "First1", "First2"]
    assert list((workspace.folder / "tmp").iterdir()) == []
    result = workspace.run_in_process("run", "job.yaml", "--output", f"s3://{BUCKET}/in/out.csv", api=api, **environ)
    assert (result.exit_code, "would be read as input" in result.stderr) == (2, True)
    assert object_store.object_version(ObjectUrl("s3", BUCKET, "in/out.csv")) is None
