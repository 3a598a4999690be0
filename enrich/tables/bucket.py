"""A dataset in a storage: its parts are sent beside the old ones, and its manifest says which count."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

import polars as pl

from enrich.errors import CommandRefused, JobError
from enrich.job.locations import ObjectUrl
from enrich.tables import parquet, storage
from enrich.tables.atomic import COLLECT_HINT, as_write_refused
from enrich.tables.manifest import (
    MANIFEST,
    Manifest,
    PartFile,
    is_part_name,
    make_manifest,
    new_part_name,
    read_manifest,
)


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
            rows = parquet.write(raw, schema, frames)
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
        storage.delete_objects(target, [_object_url(target, name).key for name in stale])


def check_own_bucket(target: ObjectUrl) -> None:
    """Refuse to write where anything is but a dataset that we wrote. Raises JobError."""
    manifest = _bucket_manifest(target)
    foreign = _object_names(target) - {MANIFEST} - (manifest.part_names if manifest else set())
    if foreign:
        message = f"{target}: the output would go among other objects: {_object_url(target, min(foreign))}"
        raise JobError(message, "name a folder of its own")


def _object_names(target: ObjectUrl) -> set[str]:
    return {key[len(target.key) :] for key, _ in storage.list_objects(target)} - {""}


def _object_url(target: ObjectUrl, name: str) -> ObjectUrl:
    return replace(target, key=target.key + name)


def _bucket_manifest(target: ObjectUrl) -> Manifest | None:
    return read_manifest(storage.read_object(_object_url(target, MANIFEST)))


def _write_manifest(target: ObjectUrl, manifest: Manifest) -> None:
    with as_write_refused(target, "output"), tempfile.TemporaryFile() as file:
        file.write(manifest.model_dump_json().encode())
        _upload(_object_url(target, MANIFEST), cast("BinaryIO", file))


def _upload(url: ObjectUrl, file: BinaryIO) -> None:
    file.seek(0)
    try:
        storage.upload(url, file)
    except CommandRefused as error:
        raise CommandRefused(error.message, f"{error.hint}; {COLLECT_HINT}") from error
