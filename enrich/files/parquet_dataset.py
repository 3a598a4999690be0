"""Writes the output as a folder of Parquet parts, whose rows keep their order by a column."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast
from uuid import uuid4

import polars as pl

from enrich.errors import CommandRefused, JobError
from enrich.files import object_store, parquet_format
from enrich.files.atomic import COLLECT_HINT, as_write_refused, atomic_write, fsync_dir
from enrich.files.discovery import would_include
from enrich.files.manifest import (
    MANIFEST,
    Manifest,
    PartFile,
    is_part_name,
    make_manifest,
    new_part_name,
    read_manifest,
)
from enrich.job.locations import STDIN, Location, ObjectUrl


@dataclass(frozen=True, slots=True)
class FolderDatasetWriter:
    """A dataset that grows; every machine that sees the folder may write parts of it."""

    target: Path
    job: str
    #: A folder of its own, which the next start removes: so nobody writes into the draft of another run.
    parts_folder: Path

    def write_part(
        self, first_position: int, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]
    ) -> PartFile:
        """Write a part, again if need be. Raises Refused."""
        name = new_part_name(first_position)
        with self._as_write_refused(), atomic_write(self.parts_folder / name, self.parts_folder / f".{name}") as raw:
            rows = parquet_format.write(raw, schema, frames)
        return PartFile(name, first_position, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Let the parts take the place of what was there. Raises Refused; the old dataset stays then."""
        manifest = make_manifest(self.job, parts)
        # A folder that no other writer knows: whoever was taken for lost may be writing yet.
        target, complete_folder = self.target, self.parts_folder / "whole"
        old = target.with_name(_old_prefix(self.job) + target.name)
        with self._as_write_refused():
            complete_folder.mkdir(mode=0o700)
            for name in manifest.part_names:
                (self.parts_folder / name).rename(complete_folder / name)
            with atomic_write(complete_folder / MANIFEST, complete_folder / f".{MANIFEST}") as raw:
                raw.write(manifest.model_dump_json().encode())
            if target.exists():
                _recheck_own_folder(target)
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
        """Remove what has grown."""
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    @contextmanager
    def _as_write_refused(self) -> Iterator[None]:
        with as_write_refused(self.target, "output"):
            try:
                yield
            except FileNotFoundError as error:
                message = f"{self.parts_folder} is gone: another run of a job of this name may have removed it"
                raise FileNotFoundError(2, message) from error


def begin_in_folder(target: Path, job: str) -> FolderDatasetWriter:
    """Make the folder in which a dataset grows. Raises Refused."""
    parts_folder = target.with_name(_parts_prefix(job) + uuid4().hex)
    with as_write_refused(target, "output"):
        parts_folder.mkdir(mode=0o700, parents=True)
    return FolderDatasetWriter(target, job, parts_folder)


def clean_up_folder(target: Path, job: str) -> None:
    """Put right what a killed run left: the old dataset comes back if the new one did not take its place."""
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
    """Refuse to replace a folder that holds anything but a dataset that we wrote. Raises JobError."""
    manifest, existing = _folder_manifest(target), {path.name for path in target.iterdir()}
    foreign = sorted(existing - {MANIFEST} - (manifest.part_names if manifest else set()))
    if foreign or (existing and manifest is None):
        message = f"{target}: the output would replace a folder that has other files in it: {target / min(foreign)}"
        raise JobError(message, "name a folder of its own, which enrich makes")


def _recheck_own_folder(target: Path) -> None:
    """Do as check_ours, when money was spent already. Raises Refused."""
    try:
        check_own_folder(target)
    except JobError as error:
        raise CommandRefused(error.message, f"take it away; {COLLECT_HINT}") from error


def _parts_prefix(job: str) -> str:
    return f".{job}.enrich-parts."


def _old_prefix(job: str) -> str:
    return f".{job}.enrich-old."


def _remove_old_dataset(old: Path) -> None:
    """Remove a dataset that was replaced; what somebody else put there stays."""
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


@dataclass(frozen=True, slots=True)
class BucketDatasetWriter:
    """A dataset that grows; every machine that reaches the storage may write parts of it."""

    target: ObjectUrl
    job: str

    def write_part(
        self, first_position: int, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]
    ) -> PartFile:
        """Write a part, again if need be. Raises Refused."""
        name = new_part_name(first_position)
        with as_write_refused(self.target, "output"), tempfile.TemporaryFile() as file:
            raw = cast("BinaryIO", file)
            rows = parquet_format.write(raw, schema, frames)
            _upload(_object_url(self.target, name), raw)
        return PartFile(name, first_position, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Say that these parts count, and remove those that were there. Raises Refused; the old ones count then."""
        manifest = make_manifest(self.job, parts)
        if missing := manifest.part_names - _object_names(self.target):
            raise CommandRefused(
                f"{_object_url(self.target, min(missing))} is gone: another run may have removed it", COLLECT_HINT
            )
        _write_manifest(self.target, manifest)
        with suppress(CommandRefused):  # the next start does it
            clean_up_bucket(self.target)

    def discard(self) -> None:
        """Leave what was sent for the next start to remove."""


def begin_in_bucket(target: ObjectUrl, job: str) -> BucketDatasetWriter:
    """Say that the folder is ours before anything is in it, so that the next start may remove that. Raises Refused."""
    if _bucket_manifest(target) is None:
        _write_manifest(target, Manifest(dataset_of=job))
    return BucketDatasetWriter(target, job)


def clean_up_bucket(target: ObjectUrl) -> None:
    """Remove the parts that don't count: they were replaced, or are of a run that was killed."""
    # In this order: what another run finishes meanwhile is not seen yet, or named.
    existing, manifest = _object_names(target), _bucket_manifest(target)
    if manifest is not None:
        stale = filter(is_part_name, existing - manifest.part_names)
        object_store.delete_objects(target, [_object_url(target, name).key for name in stale])


def check_own_bucket(target: ObjectUrl) -> None:
    """Refuse to write where anything is but a dataset that we wrote. Raises JobError."""
    manifest = _bucket_manifest(target)
    foreign = _object_names(target) - {MANIFEST} - (manifest.part_names if manifest else set())
    if foreign:
        message = f"{target}: the output would go among other objects: {_object_url(target, min(foreign))}"
        raise JobError(message, "name a folder of its own")


def _object_names(target: ObjectUrl) -> set[str]:
    return {key[len(target.key) :] for key, _ in object_store.list_objects(target)} - {""}


def _object_url(target: ObjectUrl, name: str) -> ObjectUrl:
    return replace(target, key=target.key + name)


def _bucket_manifest(target: ObjectUrl) -> Manifest | None:
    return read_manifest(object_store.read_object(_object_url(target, MANIFEST)))


def _write_manifest(target: ObjectUrl, manifest: Manifest) -> None:
    with as_write_refused(target, "output"), tempfile.TemporaryFile() as file:
        file.write(manifest.model_dump_json().encode())
        _upload(_object_url(target, MANIFEST), cast("BinaryIO", file))


def _upload(url: ObjectUrl, file: BinaryIO) -> None:
    file.seek(0)
    try:
        object_store.upload(url, file)
    except CommandRefused as error:
        raise CommandRefused(error.message, f"{error.hint}; {COLLECT_HINT}") from error


#: So many rows make a part where one process writes all of them.
ROWS_PER_PART = 1_000_000

DatasetWriter = FolderDatasetWriter | BucketDatasetWriter


def prepare_dataset(target: Location, input_location: Location, job: str) -> None:
    """Put right what a killed run left, and make sure that the dataset can be written.

    Raises JobError when it would replace anything but a dataset of ours, Refused when it can't be written.
    """
    if isinstance(target, ObjectUrl):
        if target == input_location or would_include(
            input_location, ObjectUrl(target.scheme, target.bucket, target.key + new_part_name(0))
        ):
            raise _would_be_read_error(target)
        object_store.check_bucket(target)
        clean_up_bucket(target)
        check_own_bucket(target)
        return
    if would_include(input_location, target / new_part_name(0)):
        raise _would_be_read_error(target)
    if (
        not isinstance(input_location, ObjectUrl)
        and input_location != STDIN
        and input_location.resolve().is_relative_to(target.resolve())
    ):
        raise JobError(f"{target}: the output would replace the input", "choose another `output`")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(20, "it is a file, not a folder")
        clean_up_folder(target, job)
        if target.exists():
            check_own_folder(target)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise CommandRefused(f"{target}: the output cannot be written: {error.strerror}") from error


def begin_dataset(target: Location, job: str) -> DatasetWriter:
    """Begin to write a dataset, in one process or in many. Raises Refused."""
    return begin_in_bucket(target, job) if isinstance(target, ObjectUrl) else begin_in_folder(target, job)


def write_dataset(
    target: Location, job: str, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]
) -> None:
    """Write all frames in this process, part by part. Raises Refused; the old dataset stays then."""
    writer = begin_dataset(target, job)
    try:
        writer.finish(list(_write_parts(writer, schema, frames)))
    except BaseException:
        writer.discard()
        raise


def _write_parts(
    writer: DatasetWriter, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]
) -> Iterator[PartFile]:
    remaining, first_position = iter(frames), 0
    # A dataset without rows has its columns, too.
    frame: pl.DataFrame | None = next(remaining, pl.DataFrame(schema=schema))
    while frame is not None:
        part = writer.write_part(first_position, schema, _one_part(chain([frame], remaining)))
        yield part
        first_position += part.rows
        frame = next(remaining, None)


def _one_part(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Yield frames until a part is full."""
    rows = 0
    for frame in frames:
        yield frame
        rows += frame.height
        if rows >= ROWS_PER_PART:
            return


def _would_be_read_error(target: Location) -> JobError:
    return JobError(f"{target}: the output would be read as input by the next run", "choose another `output`")
