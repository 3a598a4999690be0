"""The order in which rows are sent (`order_by`): the largest values first."""

from __future__ import annotations

import polars as pl

from enrich.job.cell_text import clean_cells

#: A number at the start of a cell, in common notations: `1,200`, `-5`, `+.5`, `$ 5.50`, `51-200` (its 51).
_SIGN, _SYMBOL = r"([-+]?)", r"[\p{Sc}<>~≈=≥≤\s]{0,3}"
_NUMBER = rf"^{_SIGN}{_SYMBOL}{_SIGN}(\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"


def sort_keys(frame: pl.DataFrame, column_indexes: list[int]) -> pl.DataFrame:
    """Return the sort keys of the rows: for each column its number, then its text.

    A cell that is a number and nothing else has no text: `1,200` and `1200` are equal.
    """
    keys = []
    for number, column_index in enumerate(column_indexes):
        text = pl.nth(column_index).map_batches(clean_cells, return_dtype=pl.String)
        signs = pl.concat_str(text.str.extract(_NUMBER, 1), text.str.extract(_NUMBER, 2))
        digits = text.str.extract(_NUMBER, 3).str.replace_all(",", "", literal=True).cast(pl.Float64, strict=False)
        value = pl.when(signs == "-").then(-digits).otherwise(digits)
        has_text = (text != "") & ~(text.str.contains(_NUMBER + "$") & value.is_not_null())
        keys += [value.alias(f"{number}n"), pl.when(has_text).then(text).alias(f"{number}t")]
    return frame.select(keys)


def rank_rows(keys: pl.DataFrame) -> pl.Series:
    """Return each row's place in the send order: largest first, blanks last, equal ones in input order."""
    sorted_rows = keys.with_row_index("row").sort(keys.columns, descending=True, nulls_last=True, maintain_order=True)
    return sorted_rows.select("row").with_row_index("place").sort("row").get_column("place")


def order_of_rows(queue_order: pl.Series, first_position: int, height: int) -> list[int]:
    """Return the place in the send order of each row of a batch."""
    known_order = queue_order.slice(first_position, height).to_list()
    # The file may have grown since its order was read.
    return [*known_order, *range(first_position + len(known_order), first_position + height)]
