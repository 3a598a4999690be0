"""Writes the output as a folder of Parquet parts, whose rows keep their order by a column."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import polars as pl

from enrich.errors import JobError, Refused
from enrich.place import STDIN, Place, Url
from enrich.tables import bucket, folder, storage
from enrich.tables.finding import would_find
from enrich.tables.manifest import PartFile, part_name

#: So many rows make a part where one process writes all of them.
ROWS_PER_PART = 1_000_000

Draft = folder.FolderDraft | bucket.BucketDraft


def prepare(target: Place, source: Place, job: str) -> None:
    """Put right what a killed run left, and make sure that the dataset can be written.

    Raises JobError when it would replace anything but a dataset of ours, Refused when it can't be written.
    """
    if isinstance(target, Url):
        if target == source or would_find(source, Url(target.scheme, target.bucket, target.key + part_name(0))):
            raise _read_next(target)
        storage.check(target)
        bucket.mend(target)
        bucket.check_ours(target)
        return
    if would_find(source, target / part_name(0)):
        raise _read_next(target)
    if not isinstance(source, Url) and source != STDIN and source.resolve().is_relative_to(target.resolve()):
        raise JobError(f"{target}: the output would replace the input", "choose another `output`")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(20, "it is a file, not a folder")
        folder.mend(target, job)
        if target.exists():
            folder.check_ours(target)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise Refused(f"{target}: the output cannot be written: {error.strerror}") from error


def begin(target: Place, job: str) -> Draft:
    """Begin to write a dataset, in one process or in many. Raises Refused."""
    return bucket.begin(target, job) if isinstance(target, Url) else folder.begin(target, job)


def write(target: Place, job: str, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> None:
    """Write all frames in this process, part by part. Raises Refused; the old dataset stays then."""
    draft = begin(target, job)
    try:
        draft.finish(list(_parts(draft, schema, frames)))
    except BaseException:
        draft.discard()
        raise


def _parts(draft: Draft, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> Iterator[PartFile]:
    rest, first = iter(frames), 0
    # A dataset without rows has its columns, too.
    frame: pl.DataFrame | None = next(rest, pl.DataFrame(schema=schema))
    while frame is not None:
        part = draft.write_part(first, schema, _some(chain([frame], rest)))
        yield part
        first += part.rows
        frame = next(rest, None)


def _some(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Yield frames until a part is full."""
    rows = 0
    for frame in frames:
        yield frame
        rows += frame.height
        if rows >= ROWS_PER_PART:
            return


def _read_next(target: Place) -> JobError:
    return JobError(f"{target}: the output would be read as input by the next run", "choose another `output`")
