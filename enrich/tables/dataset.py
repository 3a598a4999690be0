"""Writes the output as a folder of Parquet parts, whose rows keep their order by a column."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import polars as pl

from enrich.errors import CommandRefused, JobError
from enrich.job.locations import STDIN, Location, ObjectUrl
from enrich.tables import bucket, folder, storage
from enrich.tables.finding import would_include
from enrich.tables.manifest import PartFile, new_part_name

#: So many rows make a part where one process writes all of them.
ROWS_PER_PART = 1_000_000

DatasetWriter = folder.FolderDatasetWriter | bucket.BucketDatasetWriter


def prepare_dataset(target: Location, input_location: Location, job: str) -> None:
    """Put right what a killed run left, and make sure that the dataset can be written.

    Raises JobError when it would replace anything but a dataset of ours, Refused when it can't be written.
    """
    if isinstance(target, ObjectUrl):
        if target == input_location or would_include(
            input_location, ObjectUrl(target.scheme, target.bucket, target.key + new_part_name(0))
        ):
            raise _would_be_read_error(target)
        storage.check_bucket(target)
        bucket.clean_up_bucket(target)
        bucket.check_own_bucket(target)
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
        folder.clean_up_folder(target, job)
        if target.exists():
            folder.check_own_folder(target)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise CommandRefused(f"{target}: the output cannot be written: {error.strerror}") from error


def begin_dataset(target: Location, job: str) -> DatasetWriter:
    """Begin to write a dataset, in one process or in many. Raises Refused."""
    return bucket.begin_in_bucket(target, job) if isinstance(target, ObjectUrl) else folder.begin_in_folder(target, job)


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
