"""A dataset in a folder of this machine: its parts grow beside it, and take its place together."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
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
    #: Which folder it grows in, so that it is not taken for that of another run.
    inode: int

    def write_part(self, first: int, schema: Mapping[str, pl.DataType], frames: Iterable[pl.DataFrame]) -> PartFile:
        """Write a part, again if need be. Raises Refused."""
        name = part_name(first)
        with telling(self.target, "output"):
            grows = _beside(self.target, self.job)
            if _inode(grows) != self.inode:
                raise FileNotFoundError(2, f"{grows} is not there, or that of another run")
            # Somebody whom we take for lost may be writing the same part.
            with growing(grows / name, grows / f".{name}.{uuid4().hex}") as raw:
                rows = parquet.write(raw, schema, frames)
        return PartFile(name, first, rows)

    def finish(self, parts: Iterable[PartFile]) -> None:
        """Let the parts take the place of what was there. Raises Refused; the old dataset stays then."""
        manifest = complete(self.job, parts)
        target, grows, old = self.target, _beside(self.target, self.job), _set_aside(self.target, self.job)
        with telling(target, "output"):
            if _inode(grows) != self.inode:
                raise FileExistsError(17, f"another run of a job of this name writes {grows}")
            for path in grows.iterdir():
                if path.name not in manifest.names:  # of somebody who was taken for lost
                    path.unlink()
            with growing(grows / MANIFEST, grows / f".{MANIFEST}") as raw:
                raw.write(manifest.model_dump_json(exclude_none=True).encode())
            if target.exists():
                _check_still_ours(target)
                target.rename(old)
            try:
                grows.rename(target)
            except OSError:
                mend(target, self.job)
                raise
            keep_names(target.parent)
        _remove(old)

    def discard(self) -> None:
        """Remove what has grown."""
        if _inode(grows := _beside(self.target, self.job)) == self.inode:
            shutil.rmtree(grows, ignore_errors=True)


def begin(target: Path, job: str) -> FolderDraft:
    """Make the folder in which a dataset grows. Raises Refused."""
    grows = _beside(target, job)
    with telling(target, "output"):
        shutil.rmtree(grows, ignore_errors=True)
        grows.mkdir(mode=0o700, parents=True)
        return FolderDraft(target, job, grows.stat().st_ino)


def mend(target: Path, job: str) -> None:
    """Put right what a killed run left: the old dataset comes back if the new one did not take its place."""
    prefix = _old(job)
    for old in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        place = old.with_name(old.name.removeprefix(prefix))
        if place.exists():
            _remove(old)
        else:
            old.rename(place)
    shutil.rmtree(_beside(target, job), ignore_errors=True)


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


def _beside(target: Path, job: str) -> Path:
    return target.with_name(f".{job}.enrich-parts")


def _set_aside(target: Path, job: str) -> Path:
    return target.with_name(_old(job) + target.name)


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


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None
