"""What a dataset that we wrote says of itself: its parts, and how many rows each has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from enrich.errors import CommandRefused

#: The file that makes a folder a dataset of ours; readers of Parquet leave out what begins with `_`.
MANIFEST = "_manifest.json"
_PART_NAME = re.compile(r"part-\d{10}-[0-9a-f]{8}\.parquet")


@dataclass(frozen=True, slots=True)
class PartFile:
    """A part that was written: the position of its first row, and how many it has."""

    name: str
    first_position: int
    rows: int


class _ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    rows: int


class Manifest(BaseModel):
    """The parts of a dataset, in the order of their rows."""

    model_config = ConfigDict(frozen=True)

    dataset_of: str
    rows: int = 0
    parts: tuple[_ManifestPart, ...] = ()

    @property
    def part_names(self) -> set[str]:
        """The names of the parts."""
        return {part.name for part in self.parts}


def new_part_name(first_position: int) -> str:
    """Name a part for its first row: sorted by their names the parts have the rows in order.

    Each attempt to write it has a name of its own: somebody who was taken for lost may be writing it yet.
    """
    return f"part-{first_position:010}-{uuid4().hex[:8]}.parquet"


def is_part_name(name: str) -> bool:
    """Tell whether a part may have this name, one that counts or not."""
    return _PART_NAME.fullmatch(name) is not None


def read_manifest(text: bytes | None) -> Manifest | None:
    """Read what a dataset says of itself; None when it says nothing, or it is none of ours."""
    try:
        return None if text is None else Manifest.model_validate_json(text)
    except ValidationError:
        return None


def make_manifest(job: str, parts: Iterable[PartFile]) -> Manifest:
    """Make the manifest of a dataset. Raises Refused when parts are missing, or rows are there twice."""
    ordered: Sequence[PartFile] = sorted(parts, key=lambda part: part.first_position)
    rows = 0
    for part in ordered:
        if part.first_position != rows:
            raise CommandRefused(f"the parts of the output do not follow one another at row {rows:,}", "collect again")
        rows += part.rows
    manifest_parts = tuple(_ManifestPart(name=part.name, rows=part.rows) for part in ordered)
    return Manifest(dataset_of=job, rows=rows, parts=manifest_parts)
