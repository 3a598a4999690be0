"""A dataset in a folder of this machine: its parts grow beside it, and take its place together."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import polars as pl

from enrich.errors import CommandRefused, JobError
from enrich.tables import parquet
from enrich.tables.atomic import COLLECT_HINT, as_write_refused, atomic_write, fsync_dir
from enrich.tables.manifest import MANIFEST, Manifest, PartFile, make_manifest, new_part_name, read_manifest


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
            rows = parquet.write(raw, schema, frames)
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
