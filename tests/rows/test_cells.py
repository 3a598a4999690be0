"""Blank and equal cells: one definition."""

from __future__ import annotations

import sys
import unicodedata

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.databar.task_results import is_blank as is_blank_answer
from enrich.job import cell_text
from enrich.job.cell_text import PLACEHOLDERS, blank_cells, clean, clean_cells, fold, is_blank
from tests.support.cases import in_turn

BLANKS = "\t\n\r \u00a0\u1680\u2003\u2028\u202f\u3000\u2800\u3164\uffa0"
INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a\u202c\u2060\u2066\u2069\ufe0f\ufeff\x07\x7f\u0085"[:-1]
JOINERS = "\u200c\u200d"
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.text(
    st.sampled_from("aA\u00e9e\u0301\u06a9\u0939\u094d\u2764\U0001f525 - ." + BLANKS + INVISIBLE + JOINERS), max_size=8
)


@in_turn(
    ("text", "cleaned"),
    [
        (" Ada \u00a0 Byron\u3000", "Ada Byron"),
        ("\ufeff\u200eA\u00adda\u200b", "Ada"),
        ("Zoe\u0308", "Zo\u00eb"),
        ("Zoe\u034f\u0308", "Zo\u00eb"),
        ("two\r\nlines", "two lines"),
        ("Ada\u2800Byron", "Ada Byron"),
        ("A\u200dda\u200c", "Ada"),
        ("\u200c\u0645\u06cc\u200d", "\u0645\u06cc"),
        ("\u06cc\u200cAda\u200c\u06cc", "\u06ccAda\u06cc"),
        ("\u5f20\u200d\u4f1f", "\u5f20\u4f1f"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),
        ("\U0001f469\u200d\U0001f4bb", "\U0001f469\u200d\U0001f4bb"),
        ("a\0b", "a\0b"),
        ("\u200b\u3164\u200d", ""),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    """Outer blanks and invisible characters do not count, runs of blanks are one; joiners that a script needs stay."""
    assert clean(text) == cleaned


@given(TEXTS)
def test_clean_is_idempotent(text: str) -> None:
    """Cleaned text is NFC and stays as it is."""
    cleaned = clean(text)
    assert clean(cleaned) == cleaned == unicodedata.normalize("NFC", cleaned)
    assert is_blank(text) is (cleaned == "") is is_blank_answer(text)
    assert fold(cleaned) == fold(text)


@given(TEXTS, st.lists(st.tuples(st.integers(0, 12), st.sampled_from(INVISIBLE)), max_size=4))
def test_invisible_characters_do_not_count(text: str, inserted: list[tuple[int, str]]) -> None:
    """Wherever they stand, between letters of any script."""
    spelling = text
    for place, character in inserted:
        spelling = spelling[:place] + character + spelling[place:]
    assert clean(f" {spelling}\u3000") == clean(text)


@given(st.lists(TEXTS, max_size=6))
def test_columns_are_cleaned_as_cells(texts: list[str]) -> None:
    """The vectorized form agrees with the definition."""
    column = pl.Series("^x.*$", texts, pl.String)
    assert clean_cells(column).to_list() == [clean(text) for text in texts]
    assert blank_cells(column).to_list() == [is_blank(text) for text in texts]


@pytest.mark.long
def test_every_format_character_is_invisible() -> None:
    """No character of category Cf counts, whatever version of Unicode Python has; nor does any whitespace."""
    characters = map(chr, range(0x110000))
    counted = [
        character
        for character in characters
        if (unicodedata.category(character) == "Cf" or character.isspace()) and clean(f"a{character}") != "a"
    ]
    assert counted == []


@pytest.mark.long
def test_normalizing_adds_nothing_unclean() -> None:
    """A column is searched for what is not clean before it is normalized: a letter is as clean as its parts."""
    is_unclean = cell_text._NOT_CLEAN_PATTERN.search
    for character in map(chr, range(sys.maxunicode + 1)):
        if (parts := unicodedata.normalize("NFD", character)) != character:
            assert bool(is_unclean(f"a{character}a")) == bool(is_unclean(f"a{parts}a"))


def test_placeholders_are_exact() -> None:
    """A placeholder is blank in its case alone: a person may be called Null."""
    cells = pl.Series("", [*(f" {text}\u200b" for text in PLACEHOLDERS), "Null", "None", "tbd", "?", "0"])
    assert blank_cells(cells, PLACEHOLDERS).to_list() == [True] * len(PLACEHOLDERS) + [False] * 5
