"""A dataset in a storage: its parts are sent beside the old ones, and its manifest says which count."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

import polars as pl

from enrich.errors import JobError, Refused
from enrich.place import Url
from enrich.tables import parquet, storage
from enrich.tables.atomic import AGAIN, telling
from enrich.tables.manifest import MANIFEST, Manifest, PartFile, complete, is_part, part_name, read_manifest


@dataclass(frozen=True, slots=True)
class BucketDraft:
    """A dataset that grows; every machine that reaches the storage may write parts of it."""

    target: Url
    job: str

    def write_part(self, first: int, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> PartFile:
        """Write a part, again if need be. Raises Refused."""
        name = part_name(first)
        with telling(self.target, "output"), tempfile.TemporaryFile() as file:
            raw = cast("BinaryIO", file)
            rows = parquet.write(raw, schema, frames)
            _send(_at(self.target, name), raw)
        return PartFile(name, first, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Say that these parts count, and remove those that were there. Raises Refused; the old ones count then."""
        manifest = complete(self.job, parts)
        if gone := manifest.names - _names(self.target):
            raise Refused(f"{_at(self.target, min(gone))} is gone: another run may have removed it", AGAIN)
        _say(self.target, manifest)
        with suppress(Refused):  # the next start does it
            mend(self.target)

    def discard(self) -> None:
        """Leave what was sent for the next start to remove."""


def begin(target: Url, job: str) -> BucketDraft:
    """Say that the folder is ours before anything is in it, so that the next start may remove that. Raises Refused."""
    if _manifest(target) is None:
        _say(target, Manifest(dataset_of=job))
    return BucketDraft(target, job)


def mend(target: Url) -> None:
    """Remove the parts that don't count: they were replaced, or are of a run that was killed."""
    # In this order: what another run finishes meanwhile is not seen yet, or named.
    there, manifest = _names(target), _manifest(target)
    if manifest is not None:
        left = filter(is_part, there - manifest.names)
        storage.remove(target, [_at(target, name).key for name in left])


def check_ours(target: Url) -> None:
    """Refuse to write where anything is but a dataset that we wrote. Raises JobError."""
    manifest = _manifest(target)
    strange = _names(target) - {MANIFEST} - (manifest.names if manifest else set())
    if strange:
        message = f"{target}: the output would go among other objects: {_at(target, min(strange))}"
        raise JobError(message, "name a folder of its own")


def _names(target: Url) -> set[str]:
    return {key[len(target.key) :] for key, _ in storage.below(target)} - {""}


def _at(target: Url, name: str) -> Url:
    return replace(target, key=target.key + name)


def _manifest(target: Url) -> Manifest | None:
    return read_manifest(storage.read(_at(target, MANIFEST)))


def _say(target: Url, manifest: Manifest) -> None:
    with telling(target, "output"), tempfile.TemporaryFile() as file:
        file.write(manifest.model_dump_json().encode())
        _send(_at(target, MANIFEST), cast("BinaryIO", file))


def _send(url: Url, file: BinaryIO) -> None:
    file.seek(0)
    try:
        storage.send(url, file)
    except Refused as error:
        raise Refused(error.message, f"{error.hint}; {AGAIN}") from error
