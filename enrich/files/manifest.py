"""The manifest of a dataset written by enrich: its parts and their row counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from enrich.errors import CommandRefused

#: File that marks a folder as a dataset written by enrich. Parquet readers ignore names that begin with `_`.
MANIFEST = "_manifest.json"
_PART_NAME = re.compile(r"part-\d{10}-[0-9a-f]{8}\.parquet")


@dataclass(frozen=True, slots=True)
class PartFile:
    """A written part: its name, the position of its first row (from 0) and its number of rows."""

    name: str
    first_position: int
    rows: int


class _ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    rows: int


class Manifest(BaseModel):
    """The parts of a dataset, in the order of their rows. `dataset_of` is the name of the job."""

    model_config = ConfigDict(frozen=True)

    dataset_of: str
    rows: int = 0
    parts: tuple[_ManifestPart, ...] = ()

    @property
    def part_names(self) -> set[str]:
        """The names of the parts."""
        return {part.name for part in self.parts}


def new_part_name(first_position: int) -> str:
    """Return a new name for the part that starts at a row. Parts sorted by name have their rows in order.

    Each attempt to write a part gets a unique name, because a worker marked as lost may still be writing it.
    """
    return f"part-{first_position:010}-{uuid4().hex[:8]}.parquet"


def is_part_name(name: str) -> bool:
    """Check whether a name has the form of a part name. The part need not be in the manifest."""
    return _PART_NAME.fullmatch(name) is not None


def read_manifest(text: bytes | None) -> Manifest | None:
    """Parse a manifest. None if there is none or it was not written by enrich."""
    try:
        return None if text is None else Manifest.model_validate_json(text)
    except ValidationError:
        return None


def make_manifest(job: str, parts: Iterable[PartFile]) -> Manifest:
    """Create the manifest of a dataset. Raises CommandRefused if parts are missing or overlap."""
    ordered: Sequence[PartFile] = sorted(parts, key=lambda part: part.first_position)
    rows = 0
    for part in ordered:
        if part.first_position != rows:
            raise CommandRefused(f"the parts of the output do not follow one another at row {rows:,}", "collect again")
        rows += part.rows
    manifest_parts = tuple(_ManifestPart(name=part.name, rows=part.rows) for part in ordered)
    return Manifest(dataset_of=job, rows=rows, parts=manifest_parts)
