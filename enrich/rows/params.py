"""Computes the params of rows: the first source with a value after its transforms, or why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import polars as pl
from msgspec import Struct

from enrich.files.values import has_no_text
from enrich.job.cell_text import clean, clean_cells, convert_some, map_distinct
from enrich.job.target import Param, Transform
from enrich.models import LeftOut
from enrich.rows.addresses import LEFT_OUT, company_domains, email_addresses, hosts
from enrich.rows.template import RequestTemplate, is_count

#: Longer cells are left out.
MAX_PARAM_CHARACTERS = 10_000

#: Each gets the cells that have a value, as clean text.
TRANSFORMS: Mapping[Transform, Callable[[pl.Series], pl.Series]] = {
    "trim": lambda text: text,  # done for every cell
    "lower": lambda text: clean_cells(text.str.to_lowercase()),
    "domain": company_domains,
    "host": hosts,
}

#: Rows by param and the reason why it is left out (`LeftOut`).
LeftOutCounts = Counter[tuple[str, str]]


class ParamCells(Struct, frozen=True):
    """The cells of a batch that params are computed from: as `text` and `typed`. Those in `placeholders` are blank."""

    header: Sequence[str]
    text: pl.DataFrame
    typed: pl.DataFrame
    placeholders: frozenset[str]
    _columns: dict[str, pl.Series] = {}

    def column(self, name: str) -> pl.Series:
        """Return the clean text of a column. A cell that can be no param is LEFT_OUT and the reason."""
        if name not in self._columns:
            index = self.header.index(name)
            text = _sendable(clean_cells(self.text.to_series(index)), self.placeholders)
            no_text = has_no_text(self.typed.to_series(index))
            self._columns[name] = text if no_text is None else text.set(no_text, LEFT_OUT + LeftOut.NO_TEXT)
        return self._columns[name]


def _sendable(text: pl.Series, placeholders: frozenset[str] = frozenset()) -> pl.Series:
    """Replace the cells of clean text that are never sent by LEFT_OUT and the reason."""
    cell = pl.first()
    unsendable = text.to_frame().select_seq(
        cell.is_in(list(placeholders)).alias(LeftOut.PLACEHOLDER),
        cell.str.contains(LEFT_OUT, literal=True).alias(LeftOut.NUL),
        (cell.str.len_chars() > MAX_PARAM_CHARACTERS).alias(LeftOut.TOO_LONG),
    )
    for cells in unsendable:
        if cells.any():
            text = text.set(cells, LEFT_OUT + cells.name)
    return text


#: Converts the filled cells of a param after its transforms. What it cannot convert is LEFT_OUT and the reason.
Conversion = Callable[[pl.Series], pl.Series]


def conversion_of(template: RequestTemplate, param_name: str) -> Conversion | None:
    """Return how the values of a param are converted for the API: addresses, counts, choices; None: not at all."""
    if param_name in template.email_params:
        return email_addresses
    if param_name == template.priced_by:
        return lambda cells: map_distinct(cells, lambda text: text if is_count(text) else LEFT_OUT + LeftOut.NO_COUNT)
    if (choices := template.choices.get(param_name)) is not None:
        return lambda cells: map_distinct(
            cells, lambda text: choices.get(text.casefold(), LEFT_OUT + LeftOut.NO_CHOICE)
        )
    return None


def param_values(param: Param, cells: ParamCells, conversion: Conversion | None) -> pl.Series:
    """Compute a param as it is sent: '' where it has no value, LEFT_OUT and the reason where it is left out."""
    if param.value is not None:
        constant = _converted(_sendable(pl.Series("", [clean(param.value)])), [], conversion)
        return constant.new_from_index(0, cells.text.height)
    result = pl.Series("", [""]).new_from_index(0, cells.text.height)
    for column, transforms in param.sources:
        # Most rows have their value in the first source, so the others are computed for the remaining rows only.
        unfilled = ~_has_value(result)
        if not unfilled.any():
            break
        before = result.filter(unfilled)
        value = _converted(cells.column(column).filter(unfilled), transforms, conversion)
        # Of several reasons the first is kept.
        value = value.zip_with(_has_value(value) | (before == ""), before)
        result = value if len(value) == len(result) else result.scatter(unfilled.arg_true(), value)
    return result


def _has_value(text: pl.Series) -> pl.Series:
    """Return which cells have a value. A blank is '', and a cell that is left out begins with LEFT_OUT (NUL)."""
    return text >= "\1"


def _converted(cells: pl.Series, transforms: Sequence[Transform], conversion: Conversion | None) -> pl.Series:
    """Apply the transforms, then the conversion, to the cells that have a value."""
    steps = [TRANSFORMS[transform] for transform in transforms]
    for step in steps if conversion is None else [*steps, conversion]:
        cells = convert_some(cells, _has_value(cells), step)
    return cells


def split_left_out(values: pl.Series) -> tuple[pl.Series, pl.Series | None]:
    """Return the values with '' for what is left out, and the reasons, null where there is none; None: all are null."""
    left_out = ~_has_value(values) & (values != "")
    if not left_out.any():
        return values, None
    reasons = values.str.slice(len(LEFT_OUT)).set(~left_out, None)
    return values.set(left_out, ""), reasons


def left_out_by_param(counts: LeftOutCounts) -> dict[str, dict[str, int]]:
    """Return the counts by param, the most frequent reason first."""
    by_param: dict[str, dict[str, int]] = {}
    for (param, kind), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        by_param.setdefault(param, {})[kind] = count
    return by_param


def format_left_out(by_param: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield a line for each param, such as `company: 7 free mail, 3 two addresses`."""
    for param, counts in by_param.items():
        yield f"{param}: {', '.join(f'{count:,} {kind}' for kind, count in counts.items())}"
