"""The one definition of a blank cell and of equal cells. Everything that compares cells uses it.

Outer blanks and invisible characters do not count, inner runs of blanks are one space, and text is in Unicode NFC. Case
counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

#: Cells with one of these texts are blank, unless the job has its own list (`blanks`). Case counts: Null is a name.
PLACEHOLDERS = (
    *("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!"),
    *("N/A", "n/a", "NULL", "null", "-", "--", ".", "TBD"),
)
#: An empty list and an empty object of a JSON or Parquet input. They are blank, also with a list of the job's own.
EMPTY_VALUES = ("[]", "{}")

#: First and last of each range. Whitespace, and characters that are drawn as an empty space.
_BLANK_RANGES = (
    *((0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x2800, 0x2800), (0x3000, 0x3000), (0x3164, 0x3164), (0xFFA0, 0xFFA0)),
)
#: Control characters but NUL, category Cf but the two joiners, and what Unicode says may be ignored when it is drawn.
_INVISIBLE_RANGES = (
    *((0x01, 0x08), (0x0E, 0x1B), (0x7F, 0x84), (0x86, 0x9F), (0xAD, 0xAD), (0x034F, 0x034F), (0x0600, 0x0605)),
    *((0x061C, 0x061C), (0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x115F, 0x1160)),
    *((0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200B), (0x200E, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F)),
    *((0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFF0, 0xFFFB), (0x110BD, 0x110BD), (0x110CD, 0x110CD)),
    *((0x13430, 0x1343F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
)


def _character_class(ranges: Collection[tuple[int, int]]) -> str:
    """Write ranges for the regular expressions of Python and of polars."""
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_BLANK, _INVISIBLE, _JOINER = _character_class(_BLANK_RANGES), _character_class(_INVISIBLE_RANGES), "\u200c\u200d"
_BLANKS, _INVISIBLES = re.compile(f"[{_BLANK}]+"), re.compile(f"[{_INVISIBLE}]+")
_JOINERS = re.compile(f"(.?)([{_JOINER}])[{_JOINER}]*(?=(.?))", re.DOTALL)
_SPACE, _OTHER_THAN_SPACE = _character_class([(0x1C, 0x20)]), _character_class([(0x1C, 0x1F)])
#: Matches text that `clean` changes, and a few more.
_NOT_CLEAN = f"[{_INVISIBLE}{_JOINER}{_BLANK.replace(_SPACE, _OTHER_THAN_SPACE)}]|^ | $|  "
_NOT_CLEAN_PATTERN = re.compile(_NOT_CLEAN)


def clean(text: str) -> str:
    """Return the text that is compared and sent. Blank text becomes ''. NUL stays."""
    text = unicodedata.normalize("NFC", text)
    # One step may bring together what the next one changes.
    while _NOT_CLEAN_PATTERN.search(text) and (cleaned := _clean_once(text)) != text:
        text = cleaned
    return text


def _clean_once(text: str) -> str:
    text = _BLANKS.sub(" ", _INVISIBLES.sub("", text)).strip(" ")
    return unicodedata.normalize("NFC", _JOINERS.sub(_joined, unicodedata.normalize("NFC", text)))


def _joined(match: re.Match[str]) -> str:
    """Keep a joiner inside a word of a script that needs it (Persian, Hindi …), or inside an emoji."""
    before, joiner, after = match.groups()
    return before + joiner if _takes_joiner(before) and _takes_joiner(after) else before


def _takes_joiner(letter: str) -> bool:
    category = unicodedata.category(letter) if letter else ""
    return category in {"So", "Sk", "Mn", "Mc"} or (
        category in {"Lo", "Lm"} and unicodedata.east_asian_width(letter) not in "WFH"
    )


def is_blank(text: str) -> bool:
    """Return whether a text is blank. Placeholders are not: see `blank_cells`."""
    # The first test settles almost all.
    return not (text[:1].isascii() and text[:1].isalnum()) and not clean(text)


def fold(text: str) -> str:
    """Return the text for comparisons that ignore case."""
    return clean(text).casefold()


def clean_cells(cells: pl.Series) -> pl.Series:
    """Clean each cell of a column of text."""
    import polars as pl  # noqa: PLC0415 - commands that read no input need not wait for it

    text, cell = cells.alias(""), pl.first()
    is_wide, is_unclean = text.to_frame().select_seq(
        is_wide=cell.str.len_bytes() != cell.str.len_chars(), is_unclean=cell.str.contains(_NOT_CLEAN)
    )
    # ASCII is NFC. Normalizing adds nothing that is not clean.
    text = convert_some(text, is_wide, lambda wide: wide.str.normalize("NFC"))
    return convert_some(text, is_unclean, lambda unclean: map_distinct(unclean, clean))


def blank_cells(cells: pl.Series, placeholders: Collection[str] = ()) -> pl.Series:
    """Return which cells are blank, or one of the placeholders."""
    text = clean_cells(cells)
    return text.is_in(["", *placeholders])


def convert_some(cells: pl.Series, chosen: pl.Series, convert: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Convert the chosen cells of a column. `chosen` runs parallel to it."""
    if not chosen.any():
        return cells
    is_all = chosen.all(ignore_nulls=False)
    return convert(cells) if is_all else cells.scatter(chosen.arg_true(), convert(cells.filter(chosen)))


def map_distinct(cells: pl.Series, convert: Callable[[str], str]) -> pl.Series:
    """Convert each distinct cell of a column of text once."""
    import polars as pl  # noqa: PLC0415 - likewise

    return pl.Series("", list(map(cache(convert), cells.to_list())), pl.String)
