"""The output as a folder of parts: published whole or not at all, replacing only our own, row order in a column."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import pytest

from enrich.errors import CommandRefused, JobError
from enrich.files import object_store, parquet_dataset
from enrich.files.parquet_dataset import MANIFEST, read_manifest
from enrich.files.reader import InputTable
from enrich.files.writer import prepare_file, write_file
from enrich.job.local_files import inclusion_problem
from enrich.job.locations import Location, ObjectUrl
from enrich.job.spec import Input, Output
from tests.support.cases import first_quick, in_turn
from tests.support.object_storage import BUCKET, download_object, put_object
from tests.support.table_files import read_table, write_table
from tests.support.workspace import HEADER, SandboxApi, Workspace, make_leads

SCHEMA = {"A": pl.String(), "enrich_index": pl.Int64()}


def frames(*rows: int, start: int = 0) -> Iterator[pl.DataFrame]:
    """Make frames with this many rows each."""
    first = start
    for height in rows:
        index = range(first, first + height)
        yield pl.DataFrame({"A": [f"row {number}" for number in index], "enrich_index": index}, SCHEMA)
        first += height


def write_dataset(target: Location, *rows: int) -> None:
    """Write a dataset as a run does, from its start."""
    prepare_file(target, Path("/leads.csv"), "job")
    write_file(target, Output(path="out/"), job="job", schema=SCHEMA, frames=frames(*rows), new_columns=1)


def begin_dataset(target: Location) -> parquet_dataset.DatasetWriter:
    """Begin a dataset as a run does, from its start."""
    prepare_file(target, Path("/leads.csv"), "job")
    return parquet_dataset.begin_dataset(target, "job", SCHEMA)


def write_late_part(draft: parquet_dataset.DatasetWriter) -> None:
    """Write a part like a worker that was taken for lost: the run never gets its result."""
    with suppress(CommandRefused):
        draft.write_part(0, frames(2, start=100))


def part_names(folder: Path) -> list[str]:
    """List the parts of a dataset without the random ends of their names."""
    return [path.name[:15] for path in sorted(folder.glob("part-*"))]


def file_names(folder: Path) -> list[str]:
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


def row_indexes(folder: Path) -> list[int]:
    """Return the row numbers, in the order of the parts."""
    return pl.concat(pl.read_parquet(path) for path in sorted(folder.glob("part-*.parquet")))["enrich_index"].to_list()


@pytest.fixture(params=["disk", pytest.param("storage", marks=pytest.mark.long)])
def dataset_location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Return where the dataset goes: a folder or a storage URL."""
    if request.param == "disk":
        return tmp_path / "out" / "leads"
    request.getfixturevalue("bucket")
    return ObjectUrl("s3", BUCKET, "out/leads/")


def download_dataset(target: Location, into: Path) -> Path:
    """Download a dataset to disk, as its manifest lists it."""
    if isinstance(target, Path):
        return target
    into.mkdir(exist_ok=True)
    for path in into.iterdir():
        path.unlink()
    for key, _ in object_store.list_objects(target):
        download_object(into, key)
    return into


def test_parts_contain_all_rows_in_order(dataset_location: Location, tmp_path: Path) -> None:
    """The parts hold all rows in order, are named for their first row and replaced as a whole; no other file stays."""
    with patch.object(parquet_dataset, "ROWS_PER_PART", 5):
        write_dataset(dataset_location, 3, 3, 4, 1)
    folder = download_dataset(dataset_location, tmp_path / "fetched")
    assert part_names(folder) == ["part-0000000000", "part-0000000006"]
    assert row_indexes(folder) == list(range(11))
    output = read_manifest((folder / MANIFEST).read_bytes())
    assert output is not None
    assert (output.rows, [part.rows for part in output.parts]) == (11, [6, 5])
    assert pl.read_parquet(folder)["enrich_index"].to_list() == list(range(11))  # the manifest is no obstacle
    write_dataset(dataset_location, 2)
    folder = download_dataset(dataset_location, tmp_path / "fetched")
    assert part_names(folder) == ["part-0000000000"]
    assert row_indexes(folder) == [0, 1]
    if isinstance(dataset_location, Path):
        assert file_names(dataset_location.parent) == ["leads"]


def test_empty_dataset_has_columns(dataset_location: Location, tmp_path: Path) -> None:
    """An empty dataset has the same columns."""
    write_dataset(dataset_location)
    (part,) = download_dataset(dataset_location, tmp_path / "fetched").glob("part-*.parquet")
    assert dict(pl.read_parquet_schema(part)) == SCHEMA


def test_dataset_permissions(tmp_path: Path) -> None:
    """The dataset's files are for their owner only (personal data)."""
    write_dataset(tmp_path / "out", 1)
    assert [path.stat().st_mode & 0o777 for path in sorted((tmp_path / "out").iterdir())] == [0o600, 0o600]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


@pytest.mark.long
def test_concurrent_part_writers(dataset_location: Location, tmp_path: Path) -> None:
    """Parts can be written in any order, on any machine and twice; parts of lost workers don't count."""
    writer = begin_dataset(dataset_location)
    draft = pickle.loads(pickle.dumps(writer))  # noqa: S301 - pickled on this line
    parts = [draft.write_part(first, frames(2, start=first)) for first in (4, 0, 2, 0)]
    draft.write_part(1, frames(7, start=1))
    writer.finish(parts[:3])
    folder = download_dataset(dataset_location, tmp_path / "fetched")
    assert row_indexes(folder) == [0, 1, 2, 3, 4, 5]
    assert len(file_names(folder)) == 4


@pytest.mark.long
@pytest.mark.parametrize("firsts", [(0, 4), (2,), (0, 0), (0, 1)])
def test_missing_or_duplicate_rows_are_refused(
    dataset_location: Location, tmp_path: Path, firsts: tuple[int, ...]
) -> None:
    """Missing or duplicate rows are refused, and the old dataset stays."""
    write_dataset(dataset_location, 1)
    draft = begin_dataset(dataset_location)
    parts = [draft.write_part(first, frames(2, start=first)) for first in firsts]
    with pytest.raises(CommandRefused, match="the parts of the output do not follow one another"):
        draft.finish(parts)
    written_before = download_dataset(dataset_location, tmp_path / "fetched")
    output = read_manifest((written_before / MANIFEST).read_bytes())
    assert output is not None
    assert [part.rows for part in output.parts] == [1]


class InterruptedByTestError(Exception):
    """The error that a signal raises between two batches."""


@pytest.mark.parametrize(
    "error",
    first_quick(2, [CommandRefused("the input changed"), InterruptedByTestError(), KeyboardInterrupt()]),
    ids=repr,
)
def test_unfinished_dataset_is_not_published(dataset_location: Location, tmp_path: Path, error: BaseException) -> None:
    """An unfinished dataset is not published: the old one counts, and the next start removes the leftovers."""
    write_dataset(dataset_location, 1)

    def some() -> Iterator[pl.DataFrame]:
        yield from frames(6)
        raise error

    with patch.object(parquet_dataset, "ROWS_PER_PART", 5), pytest.raises(type(error)) as caught:
        write_file(dataset_location, Output(path="out/"), job="job", schema=SCHEMA, frames=some(), new_columns=1)
    assert caught.value is error
    prepare_file(dataset_location, Path("/leads.csv"), "job")
    assert row_indexes(download_dataset(dataset_location, tmp_path / "fetched")) == [0]


KILLED_SCRIPT = """
import os, signal, sys
from pathlib import Path
from unittest.mock import patch
from enrich.files import parquet_dataset
from enrich.files.writer import prepare_file
from tests.files.test_parquet_dataset import SCHEMA, frames

target, moment = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepare_file(target, Path("/leads.csv"), "job")
draft = parquet_dataset.begin_dataset(target, "job", SCHEMA)
part = draft.write_part(0, frames(3))
if moment == "parts":
    die()
rename = Path.rename
def renamed(path, to):
    if moment == "between" and to == target:
        die()
    return rename(path, to)
with patch.object(Path, "rename", renamed), patch.object(parquet_dataset, "_remove_old_dataset", die):
    draft.finish([part])
"""


@pytest.mark.long
@pytest.mark.parametrize(("moment", "rows"), [("parts", 2), ("between", 2), ("after", 3)])
def test_kill_during_swap(tmp_path: Path, moment: str, rows: int) -> None:
    """After a kill during the swap, when neither dataset is in place, the next start repairs it."""
    target = tmp_path / "out" / "2026-11-24"
    write_dataset(target, 2)
    killed = subprocess.run([sys.executable, "-c", KILLED_SCRIPT, str(target), moment], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() == (moment != "between")
    prepare_file(tmp_path / "out" / "2026-11-25", Path("/leads.csv"), "job")
    assert file_names(tmp_path / "out") == ["2026-11-24"]
    assert row_indexes(target) == list(range(rows))


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_leftover_objects_are_removed(tmp_path: Path) -> None:
    """Leftover parts are removed only where a manifest marks the folder as ours; the parts it lists stay."""
    target = ObjectUrl("s3", BUCKET, "out/")
    write_dataset(target, 2)
    parquet_dataset.begin_dataset(target, "job", SCHEMA).write_part(0, frames(3))
    prepare_file(target, Path("/leads.csv"), "job")
    assert row_indexes(download_dataset(target, tmp_path / "fetched")) == [0, 1]
    (part,) = [key for key, _ in object_store.list_objects(target) if "part-" in key]
    put_object(part.replace("out/", "copied/"), b"precious")
    with pytest.raises(JobError, match="the output folder has other objects"):
        prepare_file(ObjectUrl("s3", BUCKET, "copied/"), Path("/leads.csv"), "job")


@pytest.mark.long
@pytest.mark.usefixtures("bucket")
def test_replaced_objects_removed_at_next_start(tmp_path: Path) -> None:
    """New parts count as soon as the manifest names them; replaced objects are removed at the next start."""
    target = ObjectUrl("s3", BUCKET, "out/")
    write_dataset(target, 2)
    with patch.object(object_store, "delete_objects", side_effect=CommandRefused("the object storage failed")):
        write_file(target, Output(path="out/"), job="job", schema=SCHEMA, frames=frames(3), new_columns=1)
    assert len(list(object_store.list_objects(target))) == 3
    assert [frame.height for frame in InputTable(target, Input(path=str(target))).batches()] == [3]
    prepare_file(target, Path("/leads.csv"), "job")
    assert row_indexes(download_dataset(target, tmp_path / "fetched")) == [0, 1, 2]


def test_failed_swap_keeps_old_dataset(tmp_path: Path) -> None:
    """A failed swap puts the old dataset back at once, not only at the next start."""
    write_dataset(tmp_path / "out", 2)
    rename = Path.rename

    def full(path: Path, to: Path) -> Path:
        if to == tmp_path / "out" and "enrich-parts" in str(path):
            raise OSError(28, "No space left on device")
        return rename(path, to)

    with patch.object(Path, "rename", full), pytest.raises(CommandRefused, match="No space left"):
        write_file(tmp_path / "out", Output(path="out/"), job="job", schema=SCHEMA, frames=frames(3), new_columns=1)
    assert row_indexes(tmp_path / "out") == [0, 1]
    assert file_names(tmp_path) == ["out"]


@pytest.mark.long
@pytest.mark.parametrize("foreign_file", ["leads.csv", ".hidden", "part-0000000009.parquet", "deep/leads.csv"])
@pytest.mark.parametrize("replaces_dataset", [True, False])
def test_foreign_files_are_not_replaced(
    dataset_location: Location, foreign_file: str, *, replaces_dataset: bool
) -> None:
    """A folder with foreign files is exit 2 with a file's name, before anything is spent and again before the swap."""
    if replaces_dataset:
        write_dataset(dataset_location, 2)
    writer = (
        parquet_dataset.begin_dataset(dataset_location, "job", SCHEMA)
        if replaces_dataset and isinstance(dataset_location, Path)
        else None
    )
    if isinstance(dataset_location, ObjectUrl):
        put_object(f"{dataset_location.key}{foreign_file}", b"precious")
    else:
        (dataset_location / foreign_file).parent.mkdir(parents=True, exist_ok=True)
        (dataset_location / foreign_file).write_text("precious")
    if writer is not None:
        with pytest.raises(CommandRefused, match="the output would replace a folder with other files"):
            writer.finish([writer.write_part(0, frames(1))])
        writer.discard()
    with pytest.raises(JobError) as caught:
        prepare_file(dataset_location, Path("/leads.csv"), "job")
    assert f"{dataset_location}".rstrip("/") + f"/{foreign_file.partition('/')[0]}" in caught.value.message
    if isinstance(dataset_location, Path):
        assert (dataset_location / foreign_file).read_text() == "precious"
    else:
        assert object_store.read_object(ObjectUrl("s3", BUCKET, f"{dataset_location.key}{foreign_file}")) == b"precious"


def test_empty_folder_is_replaced(tmp_path: Path) -> None:
    """An empty folder that exists already is replaced."""
    (tmp_path / "out").mkdir()
    write_dataset(tmp_path / "out", 1)
    assert row_indexes(tmp_path / "out") == [0]


@pytest.mark.long
def test_concurrent_run_with_same_name_fails(dataset_location: Location, tmp_path: Path) -> None:
    """Of two runs with one name but different ledgers, one fails: no mixed or incomplete dataset is published."""
    first = begin_dataset(dataset_location)
    part = first.write_part(0, frames(2))
    second = begin_dataset(dataset_location)
    second_part = second.write_part(0, frames(2, start=100))
    with pytest.raises(CommandRefused, match="another run"):
        first.finish([part, first.write_part(2, frames(2, start=2))])
    with pytest.raises(CommandRefused, match="another run"):
        first.finish([part])
    first.discard()
    second.finish([second_part])
    assert row_indexes(download_dataset(dataset_location, tmp_path / "fetched")) == [100, 101]


@pytest.mark.long
def test_concurrent_runs_do_not_mix_parts(dataset_location: Location, tmp_path: Path) -> None:
    """Concurrent runs publish their own parts or fail."""
    prepare_file(dataset_location, Path("/leads.csv"), "job")
    first, second = (
        parquet_dataset.begin_dataset(dataset_location, "job", SCHEMA),
        parquet_dataset.begin_dataset(dataset_location, "job", SCHEMA),
    )
    part = first.write_part(0, frames(2))
    second_part = second.write_part(0, frames(2, start=100))
    first.finish([part, first.write_part(2, frames(2, start=2))])
    assert row_indexes(download_dataset(dataset_location, tmp_path / "fetched")) == [0, 1, 2, 3]
    if isinstance(dataset_location, Path):
        second.finish([second_part])
        assert row_indexes(dataset_location) == [100, 101]
    else:
        with pytest.raises(CommandRefused, match="another run"):
            second.finish([second_part])
        assert row_indexes(download_dataset(dataset_location, tmp_path / "fetched")) == [0, 1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("lost_writer_of", ["this run", "a run that was killed"])
def test_late_writer_changes_nothing(dataset_location: Location, tmp_path: Path, lost_writer_of: str) -> None:
    """A late writer changes no published part and no later run's; the next start removes its leftovers."""
    lost = begin_dataset(dataset_location)
    draft = lost if lost_writer_of == "this run" else begin_dataset(dataset_location)
    write_late_part(lost)
    part = draft.write_part(0, frames(2))
    write_late_part(lost)
    draft.finish([part])
    write_late_part(lost)
    prepare_file(dataset_location, Path("/leads.csv"), "job")
    folder = download_dataset(dataset_location, tmp_path / "fetched")
    assert (row_indexes(folder), len(file_names(folder))) == ([0, 1], 2)
    if isinstance(dataset_location, Path):
        assert file_names(dataset_location.parent) == ["leads"]


@pytest.mark.long
def test_late_part_during_finish(dataset_location: Location, tmp_path: Path) -> None:
    """A part written late, while the run finishes, does not disturb it."""
    draft = begin_dataset(dataset_location)
    part = draft.write_part(0, frames(2))

    def slowly() -> Iterator[pl.DataFrame]:
        yield from frames(2, start=100)
        draft.finish([part])

    with suppress(CommandRefused):
        draft.write_part(0, slowly())
    prepare_file(dataset_location, Path("/leads.csv"), "job")
    folder = download_dataset(dataset_location, tmp_path / "fetched")
    assert (row_indexes(folder), len(file_names(folder))) == ([0, 1], 2)


def test_invalid_location_refused_before_spending(tmp_path: Path) -> None:
    """A dataset location that is a file, or whose parent is one, is refused before anything is spent."""
    (tmp_path / "file").touch()
    for name in ("file", "file/out"):
        with pytest.raises(CommandRefused, match="the output cannot be written"):
            prepare_file(tmp_path / name, Path("/leads.csv"), "job")


@in_turn(
    ("source", "output"),
    [
        ("leads", "leads/new"),
        ("leads", "leads"),
        ("leads/a.csv", "leads"),
        ("leads/*.parquet", "leads"),
        ("*/*.parquet", "out"),
    ],
)
def test_output_must_not_overlap_input(tmp_path: Path, source: str, output: str) -> None:
    """A dataset folder that contains the input, or lies inside it, is refused."""
    (tmp_path / "leads").mkdir()
    for name in ("a.csv", "a.parquet"):
        write_table(tmp_path / "leads" / name, HEADER, make_leads(1))
    if source == "leads/a.csv":
        with pytest.raises(JobError, match="the output would replace the input"):
            prepare_file(tmp_path / output, tmp_path / source, "job")
        return
    url = ObjectUrl("s3", BUCKET, source + ("/" if source == "leads" else ""))
    for place, target in ((tmp_path / source, tmp_path / output), (url, ObjectUrl("s3", BUCKET, f"{output}/"))):
        problem = inclusion_problem(place, target, "output")
        assert problem is not None
        assert problem[0].endswith("the output would be read as input by the next run")


@pytest.mark.long
@pytest.mark.parametrize("line", ["ledger: out/memory.db", "rejects: out/rejects.csv", "report: out/report.html"])
def test_other_outputs_inside_dataset_refused(workspace: Workspace, api: SandboxApi, line: str) -> None:
    """Another output inside the dataset folder would be lost: exit 2 with the line, before anything is spent."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(output="out/", **dict([line.split(": ")]))
    for command in (("run", "job.yaml"), ("check", "job.yaml")):
        result = workspace.run_in_process(*command, api=api)
        key = line.partition(":")[0]
        assert result.exit_code == 2
        assert f"job.yaml:3: output: {workspace.folder}/out is replaced by every run, and contains `{key}`" in (
            result.stderr + result.stdout
        )
    assert api.audit()["accepted"] == 0


@pytest.mark.long
def test_dataset_roundtrip(workspace: Workspace, api: SandboxApi) -> None:
    """A dataset works like a file with all other features; read as input, its own columns are replaced."""
    workspace.write_leads([*make_leads(3), ["", "", "", "", ""]])
    workspace.write_job(output="out/", rejects="rejects.csv", changes="{path: changes.csv, key: [First Name]}")
    result = workspace.run_in_process("run", "job.yaml", "--json", api=api)
    assert (result.exit_code, result.json_output["output"], result.json_output["rows"]) == (
        0,
        f"{workspace.folder}/out",
        4,
    )
    (part,) = (workspace.folder / "out").glob("part-*.parquet")
    header, *rows = read_table(part)
    assert header[-2:] == ["enrich_at", "enrich_index"]
    assert [(row[0], row[-1]) for row in rows] == [("First0", 0), ("First1", 1), ("First2", 2), ("", 3)]
    assert len(workspace.read_output("rejects.csv")) == 1
    assert workspace.run_in_process("collect", "job.yaml", api=api).exit_code == 0
    assert workspace.run_in_process("status", "job.yaml", api=api).exit_code == 0
    assert workspace.run_in_process("check", "job.yaml", api=api).exit_code == 0
    assert "First1" in workspace.run_in_process("explain", "job.yaml", "--row", "2", api=api).stdout
    assert workspace.run_in_process("report", "job.yaml", "--json", api=api).exit_code == 0

    again = workspace.run_in_process("run", "job.yaml", "--json", "--input", "out/", "--output", "next/", api=api)
    assert (again.exit_code, "columns.work_email: the input already has a column with this name" in again.stderr) == (
        2,
        True,
    )
    workspace.write_job(workspace.job_file.read_text().replace("work_email: email", "mail: email"))
    again = workspace.run_in_process("run", "job.yaml", "--json", "--input", "out/", "--output", "next/", api=api)
    assert (again.exit_code, again.json_output["submitted"], again.json_output["rows"]) == (0, 0, 4)
    (part,) = (workspace.folder / "next").glob("part-*.parquet")
    assert read_table(part)[0] == [*HEADER, "work_email", "mail", *header[-7:]]


@pytest.mark.long
def test_merge_into_dataset(workspace: Workspace, api: SandboxApi) -> None:
    """Merging into a dataset works as into a file."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(output="out/", merge="fill_empty", columns="{Email: email}")
    assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == 0
    (part,) = (workspace.folder / "out").glob("part-*.parquet")
    header, *rows = read_table(part)
    assert header[: len(HEADER) + 1] == [*HEADER, "enrich_status"]
    assert any("@" in row[3] for row in rows)


@pytest.mark.long
def test_refused_collect_keeps_old_dataset(workspace: Workspace, api: SandboxApi) -> None:
    """A collect refused because rows are pending keeps the old dataset."""
    workspace.write_leads(make_leads(2))
    workspace.write_job(output="out/")
    workspace.run_in_process("run", "job.yaml", api=api)
    workspace.write_leads(make_leads(3))
    result = workspace.run_in_process("collect", "job.yaml")
    assert (result.exit_code, "1 row pending" in result.stderr) == (5, True)
    assert row_indexes(workspace.folder / "out") == [0, 1]
    assert workspace.run_in_process("collect", "job.yaml", "--partial").exit_code == 0
    assert row_indexes(workspace.folder / "out") == [0, 1, 2]


@pytest.mark.long
def test_dataset_in_object_storage(
    workspace: Workspace, api: SandboxApi, bucket: dict[str, Any], tmp_path: Path
) -> None:
    """A run writes a dataset to object storage and reads it as input; other objects beside it are ignored."""
    workspace.write_leads(make_leads(3))
    workspace.write_job(output=f"s3://{BUCKET}/out/")
    for _ in range(2):
        assert workspace.run_in_process("run", "job.yaml", api=api, **bucket).exit_code == 0
    folder = download_dataset(ObjectUrl("s3", BUCKET, "out/"), tmp_path / "fetched")
    assert (len(file_names(folder)), row_indexes(folder)) == (2, [0, 1, 2])
    put_object("out/notes.txt", b"mine")
    result = workspace.run_in_process("run", "job.yaml", api=api, **bucket)
    assert (result.exit_code, f"s3://{BUCKET}/out/notes.txt" in result.stderr) == (2, True)
