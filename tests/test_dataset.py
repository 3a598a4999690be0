"""The output as a folder of parts: whole or not at all, ours only, the order of its rows in a column."""

from __future__ import annotations

import json
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

from enrich.errors import JobError, Refused
from enrich.place import Place, Url
from enrich.spec import Input, Output
from enrich.tables import dataset, storage
from enrich.tables.manifest import MANIFEST
from enrich.tables.source import Source
from enrich.tables.writing import prepare, write
from tests.buckets import BUCKET, got, put
from tests.cases import first_quick, in_turn
from tests.harness import HEADER, Api, Office, people
from tests.tables import load, save

SCHEMA = {"A": pl.String(), "enrich_index": pl.Int64()}


def frames(*rows: int, start: int = 0) -> Iterator[pl.DataFrame]:
    """Make frames of so many rows."""
    first = start
    for height in rows:
        index = range(first, first + height)
        yield pl.DataFrame({"A": [f"row {number}" for number in index], "enrich_index": index}, SCHEMA)
        first += height


def written(target: Place, *rows: int) -> None:
    """Write a dataset as a run does, from its start."""
    prepare(target, Path("/leads.csv"), "job")
    write(target, Output(path="out/"), job="job", schema=SCHEMA, frames=frames(*rows), new=1)


def begun(target: Place) -> dataset.Draft:
    """Begin a dataset as a run does, from its start."""
    prepare(target, Path("/leads.csv"), "job")
    return dataset.begin(target, "job")


def late(draft: dataset.Draft) -> None:
    """Write a part as somebody does who was taken for lost: nobody hears of it, nor what came of it."""
    with suppress(Refused):
        draft.write_part(0, SCHEMA, frames(2, start=100))


def names(folder: Path) -> list[str]:
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


def index(folder: Path) -> list[int]:
    """Return the places of the rows, in the order of the parts."""
    return pl.concat(pl.read_parquet(path) for path in sorted(folder.glob("part-*.parquet")))["enrich_index"].to_list()


@pytest.fixture(params=["disk", "storage"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Say where the dataset goes."""
    if request.param == "disk":
        return tmp_path / "out" / "leads"
    request.getfixturevalue("bucket")
    return Url("s3", BUCKET, "out/leads/")


def fetched(target: Place, into: Path) -> Path:
    """Bring a dataset to the disk, as its manifest has it."""
    if isinstance(target, Path):
        return target
    into.mkdir(exist_ok=True)
    for path in into.iterdir():
        path.unlink()
    for key, _ in storage.below(target):
        got(into, key)
    return into


def test_the_parts_have_all_rows_in_order(target: Place, tmp_path: Path) -> None:
    """A part is named for its first row; they are replaced as one, and no other file is left."""
    with patch.object(dataset, "ROWS_PER_PART", 5):
        written(target, 3, 3, 4, 1)
    folder = fetched(target, tmp_path / "fetched")
    assert [name[:15] for name in names(folder)] == [MANIFEST, "part-0000000000", "part-0000000006"]
    assert index(folder) == list(range(11))
    told = json.loads((folder / MANIFEST).read_bytes())
    assert (told["dataset_of"], told["rows"], [part["rows"] for part in told["parts"]]) == ("job", 11, [6, 5])
    written(target, 2)
    folder = fetched(target, tmp_path / "fetched")
    assert [name[:15] for name in names(folder)] == [MANIFEST, "part-0000000000"]
    assert index(folder) == [0, 1]
    if isinstance(target, Path):
        assert names(target.parent) == ["leads"]


def test_a_dataset_without_rows_has_its_columns(target: Place, tmp_path: Path) -> None:
    """Whoever reads it finds the same table."""
    written(target)
    (part,) = fetched(target, tmp_path / "fetched").glob("*.parquet")
    assert dict(pl.read_parquet_schema(part)) == SCHEMA


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    """Personal data."""
    written(tmp_path / "out", 1)
    assert [path.stat().st_mode & 0o777 for path in sorted((tmp_path / "out").iterdir())] == [0o600, 0o600]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_many_write_parts_and_one_finishes(target: Place, tmp_path: Path) -> None:
    """In any order, on any machine, again if need be; parts of those who were taken for lost don't count."""
    mine = begun(target)
    draft = pickle.loads(pickle.dumps(mine))  # noqa: S301 - our own
    parts = [draft.write_part(first, SCHEMA, frames(2, start=first)) for first in (4, 0, 2, 0)]
    draft.write_part(1, SCHEMA, frames(7, start=1))
    mine.finish(parts[:3])
    folder = fetched(target, tmp_path / "fetched")
    assert index(folder) == [0, 1, 2, 3, 4, 5]
    assert len(names(folder)) == 4


@pytest.mark.parametrize("firsts", first_quick(2, [(0, 4), (2,), (0, 0), (0, 1)], single=True))
def test_rows_that_are_missing_or_there_twice_are_refused(
    target: Place, tmp_path: Path, firsts: tuple[int, ...]
) -> None:
    """The old dataset stays."""
    written(target, 1)
    draft = begun(target)
    parts = [draft.write_part(first, SCHEMA, frames(2, start=first)) for first in firsts]
    with pytest.raises(Refused, match="the parts of the output do not follow one another"):
        draft.finish(parts)
    written_before = fetched(target, tmp_path / "fetched")
    told = json.loads((written_before / MANIFEST).read_bytes())
    assert [part["rows"] for part in told["parts"]] == [1]


class GivenUpError(Exception):
    """What a signal raises between two batches."""


@pytest.mark.parametrize(
    "error", first_quick(2, [Refused("the input changed"), GivenUpError(), KeyboardInterrupt()]), ids=repr
)
def test_a_dataset_that_was_not_finished_never_appears(target: Place, tmp_path: Path, error: BaseException) -> None:
    """The old one counts, and the next start removes what is left."""
    written(target, 1)

    def some() -> Iterator[pl.DataFrame]:
        yield from frames(6)
        raise error

    with patch.object(dataset, "ROWS_PER_PART", 5), pytest.raises(type(error)) as caught:
        write(target, Output(path="out/"), job="job", schema=SCHEMA, frames=some(), new=1)
    assert caught.value is error
    prepare(target, Path("/leads.csv"), "job")
    assert index(fetched(target, tmp_path / "fetched")) == [0]


KILLED = """
import os, signal, sys
from pathlib import Path
from unittest.mock import patch
from enrich.tables import dataset, folder
from enrich.tables.writing import prepare
from tests.test_dataset import SCHEMA, frames

target, moment = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepare(target, Path("/leads.csv"), "job")
draft = dataset.begin(target, "job")
part = draft.write_part(0, SCHEMA, frames(3))
if moment == "parts":
    die()
rename = Path.rename
def renamed(path, to):
    if moment == "between" and to == target:
        die()
    return rename(path, to)
with patch.object(Path, "rename", renamed), patch.object(folder, "_remove", die):
    draft.finish([part])
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "rows"),
    [
        pytest.param("parts", 2, marks=pytest.mark.long),
        ("between", 2),
        pytest.param("after", 3, marks=pytest.mark.long),
    ],
)
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, moment: str, rows: int) -> None:
    """The next start mends the moment in which neither was there."""
    target = tmp_path / "out" / "2026-11-24"
    written(target, 2)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() == (moment != "between")
    prepare(tmp_path / "out" / "2026-11-25", Path("/leads.csv"), "job")
    assert names(tmp_path / "out") == ["2026-11-24"]
    assert index(target) == list(range(rows))


@pytest.mark.usefixtures("bucket")
def test_what_a_killed_run_sent_is_removed(tmp_path: Path) -> None:
    """Whatever looks like a part of ours, and only where a manifest says that the dataset is; it says what counts."""
    target = Url("s3", BUCKET, "out/")
    written(target, 2)
    dataset.begin(target, "job").write_part(0, SCHEMA, frames(3))
    prepare(target, Path("/leads.csv"), "job")
    assert index(fetched(target, tmp_path / "fetched")) == [0, 1]
    (part,) = [key for key, _ in storage.below(target) if "part-" in key]
    put(part.replace("out/", "copied/"), b"precious")
    with pytest.raises(JobError, match="would go among other objects"):
        prepare(Url("s3", BUCKET, "copied/"), Path("/leads.csv"), "job")


@pytest.mark.usefixtures("bucket")
def test_what_was_replaced_and_is_there_yet_is_removed_by_the_next_start(tmp_path: Path) -> None:
    """The new parts count as soon as the manifest names them, whatever becomes of the old ones."""
    target = Url("s3", BUCKET, "out/")
    written(target, 2)
    with patch.object(storage, "remove", side_effect=Refused("the storage failed")):
        write(target, Output(path="out/"), job="job", schema=SCHEMA, frames=frames(3), new=1)
    assert len(list(storage.below(target))) == 3
    assert [frame.height for frame in Source(target, Input(path=str(target))).batches()] == [3]
    prepare(target, Path("/leads.csv"), "job")
    assert index(fetched(target, tmp_path / "fetched")) == [0, 1, 2]


def test_a_swap_that_fails_leaves_the_old_dataset(tmp_path: Path) -> None:
    """At once, not only after the next start."""
    written(tmp_path / "out", 2)
    rename = Path.rename

    def full(path: Path, to: Path) -> Path:
        if to == tmp_path / "out" and "enrich-parts" in str(path):
            raise OSError(28, "No space left on device")
        return rename(path, to)

    with patch.object(Path, "rename", full), pytest.raises(Refused, match="No space left"):
        write(tmp_path / "out", Output(path="out/"), job="job", schema=SCHEMA, frames=frames(3), new=1)
    assert index(tmp_path / "out") == [0, 1]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "strange", first_quick(2, ["leads.csv", ".hidden", "part-0000000009.parquet", "deep/leads.csv"])
)
@pytest.mark.parametrize("known", [True, False])
def test_what_we_did_not_write_is_never_replaced(target: Place, strange: str, *, known: bool) -> None:
    """Exit 2 with the name of such a file, before anything is spent, and again before the swap."""
    if known:
        written(target, 2)
    mine = dataset.begin(target, "job") if known and isinstance(target, Path) else None
    if isinstance(target, Url):
        put(f"{target.key}{strange}", b"precious")
    else:
        (target / strange).parent.mkdir(parents=True, exist_ok=True)
        (target / strange).write_text("precious")
    if mine is not None:
        with pytest.raises(Refused, match="the output would replace a folder that has other files in it"):
            mine.finish([mine.write_part(0, SCHEMA, frames(1))])
        mine.discard()
    with pytest.raises(JobError) as caught:
        prepare(target, Path("/leads.csv"), "job")
    assert f"{target}".rstrip("/") + f"/{strange.partition('/')[0]}" in caught.value.message
    if isinstance(target, Path):
        assert (target / strange).read_text() == "precious"
    else:
        assert storage.read(Url("s3", BUCKET, f"{target.key}{strange}")) == b"precious"


def test_a_folder_that_is_empty_may_be_replaced(tmp_path: Path) -> None:
    """Somebody made it beforehand."""
    (tmp_path / "out").mkdir()
    written(tmp_path / "out", 1)
    assert index(tmp_path / "out") == [0]


def test_a_run_whose_parts_another_has_removed_fails(target: Place, tmp_path: Path) -> None:
    """Of a job of its name, with another ledger: nothing is published that lacks parts, or has those of the other."""
    mine = begun(target)
    part = mine.write_part(0, SCHEMA, frames(2))
    theirs = begun(target)
    others = theirs.write_part(0, SCHEMA, frames(2, start=100))
    with pytest.raises(Refused, match="another run"):
        mine.finish([part, mine.write_part(2, SCHEMA, frames(2, start=2))])
    with pytest.raises(Refused, match="another run"):
        mine.finish([part])
    mine.discard()
    theirs.finish([others])
    assert index(fetched(target, tmp_path / "fetched")) == [100, 101]


def test_two_runs_at_a_time_do_not_mix_their_parts(target: Place, tmp_path: Path) -> None:
    """Each publishes its own, or fails."""
    prepare(target, Path("/leads.csv"), "job")
    mine, theirs = dataset.begin(target, "job"), dataset.begin(target, "job")
    part = mine.write_part(0, SCHEMA, frames(2))
    others = theirs.write_part(0, SCHEMA, frames(2, start=100))
    mine.finish([part, mine.write_part(2, SCHEMA, frames(2, start=2))])
    assert index(fetched(target, tmp_path / "fetched")) == [0, 1, 2, 3]
    if isinstance(target, Path):
        theirs.finish([others])
        assert index(target) == [100, 101]
    else:
        with pytest.raises(Refused, match="another run"):
            theirs.finish([others])
        assert index(fetched(target, tmp_path / "fetched")) == [0, 1, 2, 3]


@pytest.mark.parametrize("whose", first_quick(1, ["this run", "a run that was killed"]))
def test_who_was_taken_for_lost_changes_nothing(target: Place, tmp_path: Path, whose: str) -> None:
    """Neither parts that count already nor what a later run writes; what he leaves, the next start removes."""
    lost = begun(target)
    draft = lost if whose == "this run" else begun(target)
    late(lost)
    part = draft.write_part(0, SCHEMA, frames(2))
    late(lost)
    draft.finish([part])
    late(lost)
    prepare(target, Path("/leads.csv"), "job")
    folder = fetched(target, tmp_path / "fetched")
    assert (index(folder), len(names(folder))) == ([0, 1], 2)
    if isinstance(target, Path):
        assert names(target.parent) == ["leads"]


def test_who_is_in_the_middle_of_a_part_changes_nothing(target: Place, tmp_path: Path) -> None:
    """The run finishes meanwhile."""
    draft = begun(target)
    part = draft.write_part(0, SCHEMA, frames(2))

    def slowly() -> Iterator[pl.DataFrame]:
        yield from frames(2, start=100)
        draft.finish([part])

    with suppress(Refused):
        draft.write_part(0, SCHEMA, slowly())
    prepare(target, Path("/leads.csv"), "job")
    folder = fetched(target, tmp_path / "fetched")
    assert (index(folder), len(names(folder))) == ([0, 1], 2)


def test_a_dataset_that_cannot_be_is_told_before_anything_is_spent(tmp_path: Path) -> None:
    """A file where its folder should be, or the folder above."""
    (tmp_path / "file").touch()
    for name in ("file", "file/out"):
        with pytest.raises(Refused, match="the output cannot be written"):
            prepare(tmp_path / name, Path("/leads.csv"), "job")


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
def test_neither_input_nor_what_the_next_run_reads_is_replaced(tmp_path: Path, source: str, output: str) -> None:
    """The folder has the leads in it, or lies among them."""
    (tmp_path / "leads").mkdir()
    for name in ("a.csv", "a.parquet"):
        save(tmp_path / "leads" / name, HEADER, people(1))
    with pytest.raises(JobError, match=r"the output would (replace|be read as) (the )?input"):
        prepare(tmp_path / output, tmp_path / source, "job")
    base = f"s3://{BUCKET}"
    url = Url("s3", BUCKET, source + ("/" if source == "leads" else ""))
    if source != "leads/a.csv":
        with pytest.raises(JobError, match=f"{base}/{output}/: the output would be read as input"):
            prepare(Url("s3", BUCKET, f"{output}/"), url, "job")


@pytest.mark.parametrize("line", ["ledger: out/memory.db", "rejects: out/rejects.csv", "report: out/report.html"])
def test_no_other_file_of_the_job_goes_into_the_folder(office: Office, api: Api, line: str) -> None:
    """It would be lost: exit 2 with the line, before anything is spent."""
    office.write_leads(people(1))
    office.write_job(output="out/", **dict([line.split(": ")]))
    for command in (("run", "job.yaml"), ("check", "job.yaml")):
        done = office.command(*command, api=api)
        key = line.partition(":")[0]
        assert done.code == 2
        assert f"job.yaml:3: output: {office.folder}/out is replaced as a whole by every run, and has `{key}`" in (
            done.stderr + done.stdout
        )
    assert api.audit()["accepted"] == 0


def test_a_run_writes_a_dataset_and_reads_it_again(office: Office, api: Api) -> None:
    """All that a job does beside it works as with a file; read as input its own columns are replaced."""
    office.write_leads([*people(3), ["", "", "", "", ""]])
    office.write_job(output="out/", rejects="rejects.csv", changes="{path: changes.csv, key: [First Name]}")
    done = office.command("run", "job.yaml", "--json", api=api)
    assert (done.code, done.receipt["output"], done.receipt["rows"]) == (0, f"{office.folder}/out", 4)
    (part,) = (office.folder / "out").glob("*.parquet")
    header, *rows = load(part)
    assert header[-2:] == ["enrich_at", "enrich_index"]
    assert [(row[0], row[-1]) for row in rows] == [("First0", 0), ("First1", 1), ("First2", 2), ("", 3)]
    assert len(office.output("rejects.csv")) == 1
    assert office.command("collect", "job.yaml", api=api).code == 0
    assert office.command("status", "job.yaml", api=api).code == 0
    assert office.command("check", "job.yaml", api=api).code == 0
    assert "First1" in office.command("explain", "job.yaml", "--row", "2", api=api).stdout
    assert office.command("report", "job.yaml", "-o", "report.html", api=api).code == 0

    again = office.command("run", "job.yaml", "--json", "--input", "out/", "--output", "next/", api=api)
    assert (again.code, "columns.work_email: the input has a column of this name already" in again.stderr) == (2, True)
    office.write_job(office.job_file.read_text().replace("work_email: email", "mail: email"))
    again = office.command("run", "job.yaml", "--json", "--input", "out/", "--output", "next/", api=api)
    assert (again.code, again.receipt["submitted"], again.receipt["rows"]) == (0, 0, 4)
    (part,) = (office.folder / "next").glob("*.parquet")
    assert load(part)[0] == [*HEADER, "work_email", "mail", *header[-7:]]


def test_merging_completes_columns_of_the_dataset(office: Office, api: Api) -> None:
    """As in a file."""
    office.write_leads(people(2))
    office.write_job(output="out/", merge="fill_empty", columns="{Email: email}")
    assert office.command("run", "job.yaml", api=api).code == 0
    (part,) = (office.folder / "out").glob("*.parquet")
    header, *rows = load(part)
    assert header[: len(HEADER) + 1] == [*HEADER, "enrich_status"]
    assert any("@" in row[3] for row in rows)


def test_a_refused_collect_leaves_the_old_dataset(office: Office, api: Api) -> None:
    """Rows are pending that are not to be partial."""
    office.write_leads(people(2))
    office.write_job(output="out/")
    office.command("run", "job.yaml", api=api)
    office.write_leads(people(3))
    done = office.command("collect", "job.yaml")
    assert (done.code, "1 rows are pending" in done.stderr) == (5, True)
    assert index(office.folder / "out") == [0, 1]
    assert office.command("collect", "job.yaml", "--partial").code == 0
    assert index(office.folder / "out") == [0, 1, 2]


def test_a_run_writes_a_dataset_to_a_storage(office: Office, api: Api, bucket: dict[str, Any], tmp_path: Path) -> None:
    """And takes it as its input; what lies there beside it is read by nobody."""
    office.write_leads(people(3))
    office.write_job(output=f"s3://{BUCKET}/out/")
    for _ in range(2):
        assert office.command("run", "job.yaml", api=api, **bucket).code == 0
    folder = fetched(Url("s3", BUCKET, "out/"), tmp_path / "fetched")
    assert (len(names(folder)), index(folder)) == (2, [0, 1, 2])
    put("out/notes.txt", b"mine")
    done = office.command("run", "job.yaml", api=api, **bucket)
    assert (done.code, f"s3://{BUCKET}/out/notes.txt" in done.stderr) == (2, True)
