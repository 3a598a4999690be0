"""The job's `where`: what is allowed in it, and its computation.

polars takes time that grows with the square of the operators, ends the process where a text gets too long, and gives
another number of rows, or another answer in another batch, where a function looks at several rows.
"""

from __future__ import annotations

import re

import polars as pl

#: So many operators take about half a second a batch.
MAX_OPERATORS = 500
PER_ROW_MESSAGE = "must say yes or no for each row by itself"
WHERE_EXAMPLE = "for example: Country = 'DE'"

#: Text, names in quotes and comments: what is in them is no SQL.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)
_OPERATOR = re.compile(
    r"\b(?:and|or|not|xor|when|like|ilike|rlike|regexp|between|is|div)\b|[-+*/%=<>!~|&^]+|::", re.IGNORECASE
)
#: What looks at other rows than one's own, or makes more or fewer of them.
_CROSS_ROW_FUNCTIONS = re.compile(
    r"\b(?:over|select|qualify)\b|"
    r"\b(?:count|sum|total|min|max|avg|mean|median|mode|first|last|any_value|first_value|last_value|nth_value|std\w*|"
    r"var|variance|var_\w+|quantile\w*|percentile\w*|corr|covar\w*|array_agg|string_agg|listagg|group_concat|"
    r"bool_and|bool_or|every|approx_\w+|row_number|rank|dense_rank|percent_rank|cume_dist|ntile|lag|lead|unnest|"
    r"explode|generate_series|columns)\s*\(",
    re.IGNORECASE,
)
#: What makes a text of any length.
_PADDING_FUNCTIONS = re.compile(r"\b(lpad|rpad|repeat|space)\s*\(", re.IGNORECASE)


def expression_problem(expression: str) -> str | None:
    """Say why an expression is refused before it is computed, None when it is not."""
    unquoted = _QUOTED.sub(" ", expression)
    if _CROSS_ROW_FUNCTIONS.search(unquoted):
        return PER_ROW_MESSAGE
    if padding := _PADDING_FUNCTIONS.search(unquoted):
        return f"{padding[1].upper()} is not allowed: it could take all memory"
    if (count := len(_OPERATOR.findall(unquoted))) > MAX_OPERATORS:
        return f"has {count:,} operators, more than {MAX_OPERATORS}: list values with IN ('a', 'b')"
    return None


def depends_on_other_rows(expression: str, columns: list[str]) -> bool:
    """Tell whether the answer for a row depends on the rows beside it, as far as three sample rows show it."""
    sample = pl.DataFrame({name: ["1", "2", ""] for name in columns})
    try:
        together = evaluate_expression(expression, sample)
        row_by_row = pl.concat([evaluate_expression(expression, sample.slice(row, 1)) for row in range(sample.height)])
    except pl.exceptions.PolarsError:
        return False  # the sample is nothing that it can be computed of
    return not together.equals(row_by_row)


def evaluate_expression(expression: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Compute the column `wanted`; the line break ends a comment. Raises PolarsError."""
    try:
        return frame.sql(f"SELECT ({expression}\n) AS wanted FROM leads", table_name="leads")  # noqa: S608 - over this frame only
    except pl.exceptions.PanicException as error:  # no Exception, and a bug of polars
        raise pl.exceptions.ComputeError(str(error)) from None
