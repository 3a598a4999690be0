"""The manifest of a dataset written by enrich: its parts and their row counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from uuid import uuid4

import msgspec
import polars as pl
from msgspec import Struct

from enrich.errors import CommandRefused
from enrich.files.parquet_format import file_schema

#: File that marks a folder as a dataset written by enrich. The list of the parts is in its metadata. It is a Parquet
#: file with the columns of the parts and no row, because polars refuses a folder that has other files in it.
MANIFEST = "_manifest.parquet"
_METADATA_KEY = "enrich_manifest"
_PART_NAME = re.compile(r"part-\d{10}-[0-9a-f]{8}\.parquet")


class PartFile(Struct, frozen=True):
    """A written part: its name, the position of its first row (from 0) and its number of rows."""

    name: str
    first_position: int
    rows: int


class _ManifestPart(Struct, frozen=True):
    name: str
    rows: int


class Manifest(Struct, frozen=True):
    """The parts of a dataset, in the order of their rows. `dataset_of` is the name of the job."""

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


def read_manifest(content: bytes | None) -> Manifest | None:
    """Parse a manifest file. None if there is none or it was not written by enrich."""
    if content is None:
        return None
    try:
        metadata = pl.read_parquet_metadata(BytesIO(content)).get(_METADATA_KEY, "")
        return msgspec.json.decode(metadata, type=Manifest)
    except (pl.exceptions.PolarsError, msgspec.DecodeError):
        return None


def manifest_file(manifest: Manifest, schema: Mapping[str, pl.DataType]) -> bytes:
    """Return the content of a manifest file. `schema` has the columns of the parts."""
    file = BytesIO()
    pl.DataFrame(schema=file_schema(schema)).write_parquet(
        file, metadata={_METADATA_KEY: msgspec.json.encode(manifest).decode()}
    )
    return file.getvalue()


def make_manifest(job: str, parts: Iterable[PartFile]) -> Manifest:
    """Create the manifest of a dataset. Raises CommandRefused if parts are missing or overlap."""
    ordered: Sequence[PartFile] = sorted(parts, key=lambda part: part.first_position)
    rows = 0
    for part in ordered:
        if part.first_position != rows:
            raise CommandRefused(f"the parts of the output do not follow one another at row {rows:,}", "collect again")
        rows += part.rows
    manifest_parts = tuple(_ManifestPart(part.name, part.rows) for part in ordered)
    return Manifest(job, rows, manifest_parts)
