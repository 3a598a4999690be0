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
from enrich.tables.manifest import MANIFEST, Manifest, PartFile, complete, is_part_of, part_name, read_manifest


@dataclass(frozen=True, slots=True)
class BucketDraft:
    """A dataset that grows; `token` is in the names of its parts, so that none replaces one of another writer."""

    target: Url
    job: str
    token: str

    def write_part(self, first: int, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> PartFile:
        """Write a part, again if need be. Raises Refused."""
        name = part_name(first, self.token)
        with telling(self.target, "output"), tempfile.TemporaryFile() as file:
            raw = cast("BinaryIO", file)
            rows = parquet.write(raw, schema, frames)
            _send(_at(self.target, name), raw)
        return PartFile(name, first, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Say that these parts count, and remove those that were there. Raises Refused; the old ones count then."""
        manifest, before = complete(self.job, parts), _manifest(self.target)
        there = _names(self.target)
        old = (before.names if before else set()) | {name for name in there if is_part_of(name, self.token)}
        _say(self.target, manifest.model_copy(update={"replaced": tuple(sorted((old & there) - manifest.names))}))
        with suppress(Refused):  # the next start does it
            mend(self.target)

    def discard(self) -> None:
        """Leave what was sent for the next start to remove."""


def begin(target: Url, job: str, token: str) -> BucketDraft:
    """Say that a writer begins, so that the next start knows what it may remove. Raises Refused."""
    before = _manifest(target) or Manifest(dataset_of=job)
    _say(target, before.model_copy(update={"writing": token}))
    return BucketDraft(target, job, token)


def mend(target: Url) -> None:
    """Remove what was replaced, and what a killed run has sent."""
    manifest = _manifest(target)
    if manifest is None:
        return
    token, replaced = manifest.writing, manifest.replaced or ()
    left = [name for name in _names(target) if name in replaced or (token is not None and is_part_of(name, token))]
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
        file.write(manifest.model_dump_json(exclude_none=True).encode())
        _send(_at(target, MANIFEST), cast("BinaryIO", file))


def _send(url: Url, file: BinaryIO) -> None:
    file.seek(0)
    try:
        storage.send(url, file)
    except Refused as error:
        raise Refused(error.message, f"{error.hint}; {AGAIN}") from error
