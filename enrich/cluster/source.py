"""The input as a source of Ray Data: read by our readers, so that every cell keeps its very text."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from enrich.cluster.presence import Heartbeats
from enrich.errors import EnrichError
from enrich.files.downloads import LocalCopies
from enrich.files.reader import ROWS_PER_PART, InputPart, InputSchema, PartReader
from enrich.job.locations import ObjectUrl

#: The column of a block that has the places of its rows in the input.
POSITION_COLUMN = "enrich:place"
#: A failure travels as the only row of such a column: raised, Ray would write it and more into its logs.
ERROR_COLUMN = "enrich:failed"
#: Small files are read together up to so many rows; an object, which is fetched as a whole, is read on up to so many.
ROWS_OF_AN_OBJECT = 1_000_000

ReadGroup = tuple[InputPart, ...]
#: Arrow knows them not, or not as they are; as text they come through.
_AS_TEXT = (pl.Categorical, pl.Enum, pl.Int128, pl.UInt128)
#: As a block is; Ray has no types that hold.
ArrowTable = Any


class PartSource(Datasource):  # type: ignore[misc] # Ray has no types that hold
    """The parts of an input."""

    def __init__(self, parts: Iterable[InputPart], shape: InputSchema, presence: Heartbeats) -> None:
        super().__init__()
        self.groups = group_parts(parts)
        self._shape = shape
        self._presence = presence

    def get_name(self) -> str:
        """Say what Ray calls it in its logs."""
        return "Leads"

    def estimate_inmemory_data_size(self) -> int | None:
        """Say nothing: how the input is divided is not for Ray to decide."""
        return None

    def get_read_tasks(self, *_: object, **__: object) -> list[Any]:
        """Make a task for each errand."""
        return [
            ReadTask(
                partial(read_group, errand, self._shape, self._presence),
                BlockMetadata(
                    num_rows=sum(part.rows for part in errand), size_bytes=None, input_files=None, exec_stats=None
                ),
            )
            for errand in self.groups
        ]


def group_parts(parts: Iterable[InputPart]) -> list[ReadGroup]:
    """Put parts together that one task reads, one after the other."""
    found: list[list[InputPart]] = []
    rows = 0
    for part in parts:
        same = bool(found) and isinstance(part.file.location, ObjectUrl) and part.file == found[-1][-1].file
        if found and rows + part.rows <= (ROWS_OF_AN_OBJECT if same else ROWS_PER_PART):
            found[-1].append(part)
            rows += part.rows
        else:
            found.append([part])
            rows = part.rows
    return [tuple(each) for each in found]


def read_group(group: ReadGroup, shape: InputSchema, presence: Heartbeats) -> Iterator[ArrowTable]:
    """Read parts as blocks; what goes wrong is the last of them."""
    copies = LocalCopies()
    try:
        with presence.sending(on=f"{group[0].file} from row {group[0].start_row + 1:,} on"):
            for part in group:
                first = part.first_position
                for frame in PartReader(part, shape, copies).batches():
                    yield to_block(first, frame)
                    first += frame.height
    except Exception as error:  # noqa: BLE001 - it is raised where somebody listens
        yield error_block(error)


def to_block(first: int, frame: pl.DataFrame) -> ArrowTable:
    """Make a block of rows, the first of which has this place."""
    columns = [
        column.cast(pl.String) if isinstance(column.dtype, _AS_TEXT) else column for column in frame.get_columns()
    ]
    places = pl.int_range(first, first + frame.height, eager=True).alias(POSITION_COLUMN)
    return pl.DataFrame([places, *columns]).to_arrow(compat_level=pl.CompatLevel.oldest())


def from_block(block: ArrowTable, schema: Mapping[str, pl.DataType]) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield stretches of rows that follow one another, each with the place of its first. Raises what went wrong."""
    if ERROR_COLUMN in block.column_names:
        packed = next(cell for cell in block.column(ERROR_COLUMN).to_pylist() if cell is not None)
        raise pickle.loads(packed)  # noqa: S301 - of our own making
    frame = pl.DataFrame(pl.from_arrow(block))
    places = frame.get_column(POSITION_COLUMN)
    begins = [0, *((places.diff() != 1).fill_null(value=False)).arg_true().to_list()]
    whole = pl.DataFrame([frame.get_column(name).cast(kind) for name, kind in schema.items()])
    for begin, end in zip(begins, [*begins[1:], len(places)], strict=True):
        if begin < end:
            yield int(places[begin]), whole[begin:end]


def error_block(error: Exception) -> ArrowTable:
    """Write down what went wrong."""
    return single_cell_block(ERROR_COLUMN, as_enrich_error(error))


def single_cell_block(name: str, value: object) -> ArrowTable:
    """Make a block of a single cell, which holds any value."""
    return pl.DataFrame({name: [pickle.dumps(value)]}).to_arrow(compat_level=pl.CompatLevel.oldest())


def as_enrich_error(error: Exception) -> EnrichError:
    """Tell a failure that nobody foresaw by its place alone: its words may hold cells."""
    if isinstance(error, EnrichError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
    return EnrichError(f"a task of the cluster failed: {type(error).__name__} at {where}", "this is a bug of enrich")
