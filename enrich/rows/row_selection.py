"""Which rows are sent, and in which order: `where`, `order_by` (the largest values first), `suppress` (never sent).

The limits of `where` come from polars. Its time grows with the square of the operators. It ends the process when a
text gets too long. A function over several rows can change the number of rows, or give another result in another batch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import polars as pl
from msgspec import Struct

from enrich.errors import UNREADABLE_HINT, CommandRefused
from enrich.job.cell_text import clean_cells
from enrich.job.local_files import read_bounded
from enrich.rows.addresses import (
    canonical_host,
    fold_address,
    fold_addresses,
    mentioned_hosts,
    parent_domains,
    read_address,
    trim_word,
    usual_hosts,
)

#: This many operators take about half a second per batch.
MAX_OPERATORS = 500
PER_ROW_MESSAGE = "must be true or false for each row alone"
WHERE_EXAMPLE = "for example: Country = 'DE'"

#: What polars says about a cell, which is text, where it needs a number.
_TEXT_AS_NUMBER = re.compile(r"cannot compare string|arithmetic on dtypes")
_TEXT_HINT = "cells are text and may be blank: TRY_CAST(… AS INT) > 50 compares numbers, and is null where CAST fails"
QUOTES_HINT = "names with blanks are put in double quotes, texts in single quotes: \"Team Size\" <> '1'"
_MISSING_COLUMN = re.compile(r'unable to find column "(.*)"; valid columns')
_SQL_POSITION = re.compile(r" at Line: \d+, Column: \d+")
#: Text, quoted names and comments: their content is not SQL.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)
_OPERATOR = re.compile(
    r"\b(?:and|or|not|xor|when|like|ilike|rlike|regexp|between|is|div)\b|[-+*/%=<>!~|&^]+|::", re.IGNORECASE
)
#: Functions and keywords that look at other rows, or change the number of rows.
_CROSS_ROW_FUNCTIONS = re.compile(
    r"\b(?:over|select|qualify)\b|"
    r"\b(?:count|sum|total|min|max|avg|mean|median|mode|first|last|any_value|first_value|last_value|nth_value|std\w*|"
    r"var|variance|var_\w+|quantile\w*|percentile\w*|corr|covar\w*|array_agg|string_agg|listagg|group_concat|"
    r"bool_and|bool_or|every|approx_\w+|row_number|rank|dense_rank|percent_rank|cume_dist|ntile|lag|lead|unnest|"
    r"explode|generate_series|columns)\s*\(",
    re.IGNORECASE,
)
#: Functions that make a text of any length.
_PADDING_FUNCTIONS = re.compile(r"\b(lpad|rpad|repeat|space)\s*\(", re.IGNORECASE)


def expression_problem(expression: str) -> str | None:
    """Return why an expression is refused before it is evaluated; None: it is allowed."""
    unquoted = _QUOTED.sub(" ", expression)
    if _CROSS_ROW_FUNCTIONS.search(unquoted):
        return PER_ROW_MESSAGE
    if padding := _PADDING_FUNCTIONS.search(unquoted):
        return f"{padding[1].upper()} is not allowed: it could use all memory"
    if (count := len(_OPERATOR.findall(unquoted))) > MAX_OPERATORS:
        return f"has {count:,} operators, more than {MAX_OPERATORS}: list values with IN ('a', 'b')"
    return None


def depends_on_other_rows(expression: str, columns: list[str]) -> bool:
    """Return whether the result for a row depends on the rows beside it, as far as three sample rows show it."""
    sample = pl.DataFrame({name: ["1", "2", ""] for name in columns})
    try:
        together = evaluate_expression(expression, sample)
        row_by_row = pl.concat([evaluate_expression(expression, sample.slice(row, 1)) for row in range(sample.height)])
    except pl.exceptions.PolarsError:
        return False  # the expression cannot be evaluated on the sample
    return not together.equals(row_by_row)


def columns_used(expression: str, header: Sequence[str], columns: Iterable[str]) -> set[str]:
    """Return those of the columns without which the expression cannot be evaluated."""
    used = set()
    for column in columns:
        try:
            evaluate_expression(expression, pl.DataFrame(schema={name: pl.String for name in header if name != column}))
        except pl.exceptions.PolarsError:
            used.add(column)
    return used


def unknown_columns(expression: str, header: Sequence[str]) -> list[str]:
    """Return the columns that an expression names and the header lacks. polars names one of them at a time."""
    columns = list(header)
    while True:
        try:
            evaluate_expression(expression, pl.DataFrame(schema=dict.fromkeys(columns, pl.String)))
        except pl.exceptions.PolarsError as error:
            missing = _MISSING_COLUMN.match(str(error))
            if missing is not None and missing[1] not in columns:
                columns.append(missing[1])
                continue
        return columns[len(header) :]


def evaluate_expression(expression: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Evaluate the expression as column `selected`. The line break ends a comment. Raises PolarsError."""
    try:
        return frame.sql(f"SELECT ({expression}\n) AS selected FROM leads", table_name="leads")  # noqa: S608 - reads this frame only
    except pl.exceptions.PanicException as error:  # not a subclass of Exception; a bug in polars
        raise pl.exceptions.ComputeError(str(error)) from None


def explain_error(error: pl.exceptions.PolarsError, *, in_cells: bool = False) -> tuple[str, str | None]:
    """Return why an expression cannot be evaluated, in one line, with a hint. `in_cells`: the reason is a cell."""
    # The position is that in a query of ours.
    reason = _SQL_POSITION.sub("", str(error).splitlines()[0])
    if "sql parser error" in reason:
        return reason, QUOTES_HINT
    return reason, _TEXT_HINT if in_cells or _TEXT_AS_NUMBER.search(reason) else None


#: A number at the start of a cell, in common notations: `1,200`, `-5`, `+.5`, `$ 5.50`, `51-200` (its 51).
_SIGN, _SYMBOL = r"([-+]?)", r"[\p{Sc}<>~≈=≥≤\s]{0,3}"
_NUMBER = rf"^{_SIGN}{_SYMBOL}{_SIGN}(\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"


def sort_keys(frame: pl.DataFrame, column_indexes: list[int]) -> pl.DataFrame:
    """Return the sort keys of the rows: for each column its number, then its text, unless that is only a number."""
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


#: An email address, alone in a cell or within other text.
_EMAIL_PATTERN = r"[^\s<>()\[\]\"',;:@|]+@[^\s<>()\[\]\"',;:@|/?#&=+\\]+"

#: Marks around an address in a sentence.
_SURROUNDING_MARKS = re.compile(r"[.!?…*_`]+$|^[*_`]+")
#: What may be before an address in the same word: a path, a query, another address.
_BEFORE_ADDRESS = re.compile(r"^(?:.*[/?#&=\\]|\++)")


class Suppression(Struct, frozen=True):
    """Email addresses and domains that are never sent, in the spelling of `fold_address` and `canonical_host`."""

    addresses: frozenset[str]
    domains: frozenset[str]
    #: A hash of the bytes of the list (SHA-256, hex).
    digest: str = ""

    def suppressed_rows(self, frame: pl.DataFrame, param_columns: Collection[int]) -> pl.Series:
        """Return which rows have a suppressed address in any cell, or a suppressed domain in a cell that a param reads.

        A domain covers all its addresses and its subdomains. `param_columns` are indexes of columns.
        """
        suppressed = pl.repeat(value=False, n=frame.height, eager=True)
        for index, cells in enumerate(frame.iter_columns()):
            text = fold_addresses(cells)
            found = text.str.extract_all(_EMAIL_PATTERN)
            addresses = found.explode().drop_nulls().unique()
            listed = [address for address in addresses if self._contains_address(address)]
            if listed:
                suppressed |= found.list.eval(pl.element().is_in(listed)).list.any()
            if index in param_columns and self.domains:
                suppressed |= self._has_listed_host(text)
        return suppressed

    def contains(self, text: str) -> bool:
        """Return whether a constant is suppressed."""
        return bool(self.suppressed_rows(pl.DataFrame({"": [text]}), [0]).any())

    def _contains_address(self, address: str) -> bool:
        local, _, host = _SURROUNDING_MARKS.sub("", address).rpartition("@")
        host = canonical_host(host.rstrip(".")) or host
        names = (local, _BEFORE_ADDRESS.sub("", local))
        return any(f"{name}@{host}" in self.addresses for name in names) or self._contains_domain(host)

    def _contains_domain(self, host: str) -> bool:
        return any(domain in self.domains for domain in parent_domains(host))

    def _has_listed_host(self, text: pl.Series) -> pl.Series:
        host = usual_hosts(text)
        listed = [each for each in host.drop_nulls().unique() if self._contains_domain(each)]
        listed += [
            cell
            for cell in text.filter(host.is_null()).unique()
            if any(map(self._contains_domain, mentioned_hosts(cell)))
        ]
        return host.zip_with(host.is_not_null(), text).is_in(listed)


#: Largest size of a list in bytes, because it is held in memory.
MAX_LIST_BYTES = 1 << 28


def read_suppression(path: Path) -> Suppression:
    """Read a list of addresses and domains, one per line; `#` begins a comment. Raises CommandRefused."""
    try:
        content = read_bounded(path, MAX_LIST_BYTES)
        lines = content.decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise CommandRefused(
            f"{path}: the list of `suppress` does not exist", "create it, or remove `suppress` from the job file"
        ) from None
    except OSError as error:
        message = f"{path}: the list of `suppress` cannot be read: {error.strerror}"
        raise CommandRefused(message, UNREADABLE_HINT) from error
    except UnicodeDecodeError as error:
        raise CommandRefused(f"{path}: the list of `suppress` is not UTF-8 text", "save it as UTF-8") from error
    addresses, domains = set(), set()
    for number, line in enumerate(lines, 1):
        entry = fold_address(line.partition("#")[0])
        if not entry:
            continue
        # `*.acme.example`, `*@acme.example`, `@acme.example` and `https://acme.example/` all mean the domain.
        address = None if " " in entry else read_address(trim_word(entry))
        if address is None or "." not in address.host or "*" in (address.local or ""):
            raise CommandRefused(
                f"{path}: line {number} must be an e-mail address or a domain",
                "use one entry per line; `*` is only in `*.acme.example` and `*@acme.example`; put `#` before a header",
            )
        if address.local:
            addresses.add(f"{address.local}@{address.host}")
        else:
            domains.add(re.sub(r"^www\.(?=.*\.)", "", address.host))
    return Suppression(frozenset(addresses), frozenset(domains), sha256(content).hexdigest())
