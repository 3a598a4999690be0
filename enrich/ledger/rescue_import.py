"""Imports rescue files into a ledger, and removes them afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from enrich.errors import CommandRefused
from enrich.ledger import rescue_merge
from enrich.ledger.database import Database
from enrich.ledger.rescue_file import find_rescue_files, read_rescue_file
from enrich.ledger.rescue_merge import RescueImport


def import_rescue_files(
    ledger: Database, other_folders: Sequence[Path], job: str, now_ms: int
) -> list[tuple[Path, RescueImport]]:
    """Import the rescue files of a ledger in the caller's transaction. The caller removes them after its commit.

    `other_folders` are the folders besides the ledger's where one may be. Raises CommandRefused for a damaged file.
    """
    location = ledger.location
    if not isinstance(location, Path):
        return []
    imported = []
    for path in find_rescue_files(location, other_folders):
        lines = read_rescue_file(path)
        # The output folder may also hold a rescue file of another ledger with the same name.
        if path.parent != location.parent and any(line.ledger != str(location) for line in lines):
            continue
        try:
            imported.append((path, rescue_merge.import_rescued(ledger, lines, job, now_ms)))
        except CommandRefused as error:
            raise CommandRefused(f"{path}: {error.message}", error.hint) from error
    return imported


def remove_imported_files(imported: Iterable[tuple[Path, RescueImport]]) -> list[tuple[Path, RescueImport]]:
    """Remove the imported files and return them. Raises CommandRefused for one that cannot be removed."""
    removed = []
    for path, result in imported:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CommandRefused(
                f"{path}: the rescue file cannot be removed: {error.strerror}", "remove it yourself"
            ) from error
        removed.append((path, result))
    return removed
