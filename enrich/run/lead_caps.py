"""The `caps` of a job with steps: at most so many leads of one group take part in its steps."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from enrich.job.cell_text import clean_cells
from enrich.job.spec import Caps
from enrich.rows.job_input import JobInput

#: Why a lead takes part in no step.
CAPPED_REASON = "over the per-group limit (caps)"


def capped_rows(job_input: JobInput, caps: Caps, begun: bytearray) -> bytearray:
    """Return which rows of the input are beyond the cap of their group, one byte for each row.

    Rows that earlier runs have `begun` count first and are never left out, then the others in the send order. Rows that
    the job leaves out, and those without a group, do not count.
    """
    order, height = job_input.queue_order(), 0
    parts = []
    for first_position, _, text in job_input.frames():
        group = clean_cells(text.get_column(caps.by).alias("")).str.to_lowercase()
        taking_part = job_input.selected_rows(text) & (group != "")
        if (suppressed := job_input.suppressed_rows(text)) is not None:
            taking_part &= ~suppressed
        rows = pl.int_range(first_position, first_position + text.height, eager=True)
        height = first_position + text.height
        is_begun = pl.Series([bool(each) for each in begun[first_position:height]], dtype=pl.Boolean)
        parts.append(pl.DataFrame({"row": rows, "group": group.hash(), "begun": is_begun}).filter(taking_part))
    capped = bytearray(height)
    if not parts:
        return capped
    table = pl.concat(parts)
    places = None if order is None else order.to_list()
    place = pl.col("row") if places is None else pl.Series("place", _places(table.get_column("row").to_list(), places))
    numbered = (
        table.with_columns(place.alias("place"))
        .sort(~pl.col("begun"), "place")
        .with_columns(pl.int_range(pl.len()).over("group").alias("number"))
    )
    for row in numbered.filter((pl.col("number") >= caps.max) & ~pl.col("begun")).get_column("row"):
        capped[row] = 1
    return capped


def _places(rows: Sequence[int], places: Sequence[int]) -> list[int]:
    return [places[row] if row < len(places) else row for row in rows]
