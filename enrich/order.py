"""The order in which rows are asked: those with the largest values of some columns first."""

from __future__ import annotations

import polars as pl

#: A number at the start of a cell, as people write it: `1,200`, `$ 5.5`, `51-200` (its 51).
_NUMBER = r"^\D{0,2}?(-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?)"


def sort_keys(frame: pl.DataFrame, places: list[int]) -> pl.DataFrame:
    """Make the keys by which the rows of a frame are compared: for each column its number, then its text."""
    keys = []
    for number, place in enumerate(places):
        text = pl.nth(place).str.strip_chars()
        size = text.str.extract(_NUMBER).str.replace_all(",", "", literal=True).cast(pl.Float64, strict=False)
        keys += [size.alias(f"{number}n"), pl.when(text != "").then(text).alias(f"{number}t")]
    return frame.select(keys)


def ranks(keys: pl.DataFrame) -> pl.Series:
    """Give each row its place in the order of asking: largest first, blanks last, equal ones as in the input."""
    order = keys.with_row_index("row").sort(keys.columns, descending=True, nulls_last=True, maintain_order=True)
    return order.select("row").with_row_index("place").sort("row").get_column("place")
