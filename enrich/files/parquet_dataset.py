"""Writes the output as a folder of Parquet parts with a manifest, locally or in object storage."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast
from uuid import uuid4

import msgspec
import polars as pl
from msgspec import Struct
from msgspec.structs import replace

from enrich.errors import UNWRITABLE_HINT, CommandRefused, JobError
from enrich.files import object_store, parquet_format
from enrich.files.atomic import COLLECT_HINT, as_write_refused, atomic_write, follow_link, fsync_dir
from enrich.job.local_files import make_folder, real_path
from enrich.job.locations import STDIN, InputLocation, Location, ObjectUrl

#: File that marks a folder as a dataset written by enrich. The list of the parts is in its metadata. It is a Parquet
#: file with the columns of the parts and no row, because polars refuses a folder that has other files in it.
MANIFEST = "_manifest.parquet"
_METADATA_KEY = "enrich_manifest"
#: What names of parts look like, also of those that are not in the manifest.
_PART_NAME = re.compile(r"part-\d{10}-[0-9a-f]{8}\.parquet")


class PartFile(Struct, frozen=True):
    """A written part: its name, the position of its first row (from 0) and its number of rows."""

    name: str
    first_position: int
    rows: int


class _ManifestPart(Struct, frozen=True):
    name: str
    rows: int


class Manifest(Struct, frozen=True):
    """The parts of a dataset, in the order of their rows."""

    rows: int = 0
    parts: tuple[_ManifestPart, ...] = ()

    @property
    def part_names(self) -> set[str]:
        """The names of the parts."""
        return {part.name for part in self.parts}


def _new_part_name(first_position: int) -> str:
    """Return a new name for the part that starts at a row. Parts sorted by name have their rows in order.

    Each attempt to write a part gets a unique name, because a worker marked as lost may still be writing it.
    """
    return f"part-{first_position:010}-{uuid4().hex[:8]}.parquet"


def read_manifest(content: bytes | None) -> Manifest | None:
    """Parse a manifest file. None if there is none or it was not written by enrich."""
    if content is None:
        return None
    try:
        metadata = pl.read_parquet_metadata(BytesIO(content)).get(_METADATA_KEY, "")
        return msgspec.json.decode(metadata, type=Manifest)
    except (pl.exceptions.PolarsError, msgspec.DecodeError):
        return None


def _manifest_file(manifest: Manifest, schema: Mapping[str, pl.DataType]) -> bytes:
    """Return the content of a manifest file. `schema` has the columns of the parts."""
    file = BytesIO()
    pl.DataFrame(schema=parquet_format.file_schema(schema)).write_parquet(
        file, metadata={_METADATA_KEY: msgspec.json.encode(manifest).decode()}
    )
    return file.getvalue()


def _make_manifest(parts: Iterable[PartFile]) -> Manifest:
    """Create the manifest of a dataset. Raises CommandRefused if parts are missing or overlap."""
    ordered, rows = sorted(parts, key=lambda part: part.first_position), 0
    for part in ordered:
        if part.first_position != rows:
            raise CommandRefused(f"the parts of the output do not follow one another at row {rows:,}", "collect again")
        rows += part.rows
    return Manifest(rows, tuple(_ManifestPart(part.name, part.rows) for part in ordered))


class FolderDatasetWriter(Struct, frozen=True):
    """Writes a dataset to a local or shared folder. Every machine with access to the folder can write parts."""

    target: Path
    job: str
    schema: Mapping[str, pl.DataType]
    #: Unique per run, so that no other run writes into it. The next run removes a leftover.
    parts_folder: Path

    def write_part(self, first_position: int, frames: Iterable[pl.DataFrame]) -> PartFile:
        """Write a part, which can be repeated after a failure. Raises CommandRefused."""
        name = _new_part_name(first_position)
        with self._as_write_refused(), atomic_write(self.parts_folder / name, self.parts_folder / f".{name}") as raw:
            rows = parquet_format.write(raw, self.schema, frames)
        return PartFile(name, first_position, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Replace the old dataset with these parts. Raises CommandRefused, and then the old dataset stays."""
        manifest = _make_manifest(parts)
        # Move the parts to a folder that other writers do not use: a worker marked as lost may still be writing.
        target, complete_folder = self.target, self.parts_folder / "whole"
        old = target.with_name(_old_prefix(self.job) + target.name)
        with self._as_write_refused():
            complete_folder.mkdir(mode=0o700)
            for name in manifest.part_names:
                (self.parts_folder / name).rename(complete_folder / name)
            with atomic_write(complete_folder / MANIFEST, complete_folder / f".{MANIFEST}") as raw:
                raw.write(_manifest_file(manifest, self.schema))
            if target.exists():
                try:
                    check_own_folder(target)
                except JobError as error:
                    raise CommandRefused(error.message, f"remove it; {COLLECT_HINT}") from error
                target.rename(old)
            try:
                complete_folder.rename(target)
            except OSError:
                clean_up_folder(target, self.job)
                raise
            fsync_dir(target.parent)
        _remove_old_dataset(old)
        self.discard()

    def discard(self) -> None:
        """Remove the parts written so far."""
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    @contextmanager
    def _as_write_refused(self) -> Iterator[None]:
        with as_write_refused(self.target, "output"):
            try:
                yield
            except FileNotFoundError as error:
                message = f"{self.parts_folder} is missing: another run of a job with this name may have removed it"
                raise FileNotFoundError(errno.ENOENT, message) from error


def clean_up_folder(target: Path, job: str) -> None:
    """Clean up after a killed run. Restore the old dataset if the new one did not replace it."""
    for path in list(target.parent.iterdir()):
        if path.name.startswith(_parts_prefix(job)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(prefix := _old_prefix(job)):
            original = path.with_name(path.name.removeprefix(prefix))
            if original.exists():
                _remove_old_dataset(path)
            else:
                path.rename(original)


def check_own_folder(target: Path) -> None:
    """Raise JobError if the folder contains anything except a dataset written by enrich."""
    manifest, existing = _folder_manifest(target), {path.name for path in target.iterdir()}
    foreign = sorted(existing - {MANIFEST} - (manifest.part_names if manifest else set()))
    if foreign or (existing and manifest is None):
        message = f"{target}: the output would replace a folder with other files: {target / min(foreign)}"
        raise JobError(message, "choose a separate folder, which enrich creates")


def _parts_prefix(job: str) -> str:
    return f".{job}.enrich-parts."


def _old_prefix(job: str) -> str:
    return f".{job}.enrich-old."


def _remove_old_dataset(old: Path) -> None:
    """Remove a replaced dataset. Files that enrich did not write stay."""
    manifest = _folder_manifest(old)
    with suppress(OSError):
        for name in manifest.part_names if manifest else ():
            (old / name).unlink(missing_ok=True)
        (old / MANIFEST).unlink(missing_ok=True)
        old.rmdir()


def _folder_manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest((folder / MANIFEST).read_bytes())
    except OSError:
        return None


class BucketDatasetWriter(Struct, frozen=True):
    """Writes a dataset to object storage. Every machine with access to the storage can write parts."""

    target: ObjectUrl
    schema: Mapping[str, pl.DataType]

    def write_part(self, first_position: int, frames: Iterable[pl.DataFrame]) -> PartFile:
        """Write a part, which can be repeated after a failure. Raises CommandRefused."""
        name = _new_part_name(first_position)
        with as_write_refused(self.target, "output"), tempfile.TemporaryFile() as file:
            raw = cast("BinaryIO", file)
            rows = parquet_format.write(raw, self.schema, frames)
            object_store.upload(_object_url(self.target, name), raw)
        return PartFile(name, first_position, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Publish these parts in the manifest and delete the old ones, which stay if it raises CommandRefused."""
        manifest = _make_manifest(parts)
        if missing := manifest.part_names - _object_names(self.target):
            raise CommandRefused(
                f"{_object_url(self.target, min(missing))} is missing: another run may have removed it", COLLECT_HINT
            )
        _write_manifest(self.target, manifest, self.schema)
        with suppress(CommandRefused):  # the next run cleans up instead
            _clean_up_bucket(self.target)

    def discard(self) -> None:
        """Do nothing. The next run removes the uploaded parts."""


def _clean_up_bucket(target: ObjectUrl) -> None:
    """Delete parts that are not in the manifest: replaced parts, or parts of a killed run."""
    # List first, then read the manifest. A part that another run publishes in between is not listed or is in it.
    existing, manifest = _object_names(target), _bucket_manifest(target)
    if manifest is not None:
        stale = filter(_PART_NAME.fullmatch, existing - manifest.part_names)
        object_store.delete_objects(target, [_object_url(target, name).key for name in stale])


def _object_names(target: ObjectUrl) -> set[str]:
    return {key[len(target.key) :] for key, _ in object_store.list_objects(target)} - {""}


def _object_url(target: ObjectUrl, name: str) -> ObjectUrl:
    return replace(target, key=target.key + name)


def _bucket_manifest(target: ObjectUrl) -> Manifest | None:
    return read_manifest(object_store.read_object(_object_url(target, MANIFEST)))


def _write_manifest(target: ObjectUrl, manifest: Manifest, schema: Mapping[str, pl.DataType]) -> None:
    with as_write_refused(target, "output"), tempfile.TemporaryFile() as file:
        file.write(_manifest_file(manifest, schema))
        object_store.upload(_object_url(target, MANIFEST), cast("BinaryIO", file))


#: Number of rows in a part if a single process writes the dataset.
ROWS_PER_PART = 1_000_000

DatasetWriter = FolderDatasetWriter | BucketDatasetWriter


def prepare_bucket(target: ObjectUrl) -> None:
    """Clean up after a killed run. Raises JobError if the folder has anything except a dataset written by enrich."""
    _clean_up_bucket(target)
    manifest = _bucket_manifest(target)
    if foreign := _object_names(target) - {MANIFEST} - (manifest.part_names if manifest else set()):
        message = f"{target}: the output folder has other objects: {_object_url(target, min(foreign))}"
        raise JobError(message, "choose a separate folder")


def prepare_folder(target: Path, input_location: InputLocation, job: str) -> None:
    """Clean up after a killed run, and check that the dataset can be written.

    Raises JobError if it would replace anything except a dataset written by enrich, or the input.
    Raises CommandRefused if it cannot be written.
    """
    if (
        isinstance(input_location, Path)
        and input_location != STDIN
        and real_path(input_location).is_relative_to(real_path(target))
    ):
        raise JobError(f"{target}: the output would replace the input", "choose another `output`")
    try:
        target = follow_link(target)
        make_folder(target.parent)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
        clean_up_folder(target, job)
        if target.exists():
            check_own_folder(target)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise CommandRefused(f"{target}: the output cannot be written: {error.strerror}", UNWRITABLE_HINT) from error


def begin_dataset(target: Location, job: str, schema: Mapping[str, pl.DataType]) -> DatasetWriter:
    """Start writing a dataset with these columns, in one process or in several. Raises CommandRefused."""
    if isinstance(target, ObjectUrl):
        # Write an empty manifest before any part, so that the next run can clean up the folder.
        if _bucket_manifest(target) is None:
            _write_manifest(target, Manifest(), schema)
        return BucketDatasetWriter(target, schema)
    target = follow_link(target)
    parts_folder = target.with_name(_parts_prefix(job) + uuid4().hex)
    with as_write_refused(target, "output"):
        parts_folder.mkdir(mode=0o700, parents=True)
    return FolderDatasetWriter(target, job, schema, parts_folder)


def write_dataset(
    target: Location, job: str, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]
) -> None:
    """Write all frames in this process, part by part. Raises CommandRefused, and then the old dataset stays."""
    writer = begin_dataset(target, job, schema)
    try:
        writer.finish(list(_write_parts(writer, frames)))
    except BaseException:
        writer.discard()
        raise


def _write_parts(writer: DatasetWriter, frames: Iterable[pl.DataFrame]) -> Iterator[PartFile]:
    remaining, first_position = iter(frames), 0
    # Without rows, write one empty part, so that the dataset has its columns.
    frame: pl.DataFrame | None = next(remaining, pl.DataFrame(schema=writer.schema))
    while frame is not None:
        part = writer.write_part(first_position, _one_part(chain([frame], remaining)))
        yield part
        first_position += part.rows
        frame = next(remaining, None)


def _one_part(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Yield the frames of one part."""
    rows = 0
    for frame in frames:
        yield frame
        rows += frame.height
        if rows >= ROWS_PER_PART:
            return
