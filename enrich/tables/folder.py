"""A dataset in a folder of this machine: its parts grow beside it, and take its place together."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import polars as pl

from enrich.errors import JobError, Refused
from enrich.tables import parquet
from enrich.tables.atomic import AGAIN, growing, keep_names, telling
from enrich.tables.manifest import MANIFEST, Manifest, PartFile, complete, part_name, read_manifest


@dataclass(frozen=True, slots=True)
class FolderDraft:
    """A dataset that grows; every machine that sees the folder may write parts of it."""

    target: Path
    job: str
    #: A folder of its own, which the next start removes: so nobody writes into the draft of another run.
    grows: Path

    def write_part(self, first: int, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> PartFile:
        """Write a part, again if need be. Raises Refused."""
        name = part_name(first)
        with self._telling(), growing(self.grows / name, self.grows / f".{name}") as raw:
            rows = parquet.write(raw, schema, frames)
        return PartFile(name, first, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Let the parts take the place of what was there. Raises Refused; the old dataset stays then."""
        manifest = complete(self.job, parts)
        # A folder that no other writer knows: whoever was taken for lost may be writing yet.
        target, whole = self.target, self.grows / "whole"
        old = target.with_name(_old(self.job) + target.name)
        with self._telling():
            whole.mkdir(mode=0o700)
            for name in manifest.names:
                (self.grows / name).rename(whole / name)
            with growing(whole / MANIFEST, whole / f".{MANIFEST}") as raw:
                raw.write(manifest.model_dump_json().encode())
            if target.exists():
                _check_still_ours(target)
                target.rename(old)
            try:
                whole.rename(target)
            except OSError:
                mend(target, self.job)
                raise
            keep_names(target.parent)
        _remove(old)
        self.discard()

    def discard(self) -> None:
        """Remove what has grown."""
        shutil.rmtree(self.grows, ignore_errors=True)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        with telling(self.target, "output"):
            try:
                yield
            except FileNotFoundError as error:
                gone = f"{self.grows} is gone: another run of a job of this name may have removed it"
                raise FileNotFoundError(2, gone) from error


def begin(target: Path, job: str) -> FolderDraft:
    """Make the folder in which a dataset grows. Raises Refused."""
    grows = target.with_name(_growing(job) + uuid4().hex)
    with telling(target, "output"):
        grows.mkdir(mode=0o700, parents=True)
    return FolderDraft(target, job, grows)


def mend(target: Path, job: str) -> None:
    """Put right what a killed run left: the old dataset comes back if the new one did not take its place."""
    for path in list(target.parent.iterdir()):
        if path.name.startswith(_growing(job)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(prefix := _old(job)):
            place = path.with_name(path.name.removeprefix(prefix))
            if place.exists():
                _remove(path)
            else:
                path.rename(place)


def check_ours(target: Path) -> None:
    """Refuse to replace a folder that holds anything but a dataset that we wrote. Raises JobError."""
    manifest, there = _manifest(target), {path.name for path in target.iterdir()}
    strange = sorted(there - {MANIFEST} - (manifest.names if manifest else set()))
    if strange or (there and manifest is None):
        message = f"{target}: the output would replace a folder that has other files in it: {target / min(strange)}"
        raise JobError(message, "name a folder of its own, which enrich makes")


def _check_still_ours(target: Path) -> None:
    """Do as check_ours, when money was spent already. Raises Refused."""
    try:
        check_ours(target)
    except JobError as error:
        raise Refused(error.message, f"take it away; {AGAIN}") from error


def _growing(job: str) -> str:
    return f".{job}.enrich-parts."


def _old(job: str) -> str:
    return f".{job}.enrich-old."


def _remove(old: Path) -> None:
    """Remove a dataset that was replaced; what somebody else put there stays."""
    manifest = _manifest(old)
    with suppress(OSError):
        for name in manifest.names if manifest else ():
            (old / name).unlink(missing_ok=True)
        (old / MANIFEST).unlink(missing_ok=True)
        old.rmdir()


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest((folder / MANIFEST).read_bytes())
    except OSError:
        return None
