"""Fits text into the columns of a terminal."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

#: Width of the lines, but for those with paths and commands.
MAX_WIDTH = 80
#: Number of reasons for skipped rows.
SHOWN_REASONS = 3
#: Terminal codes for colors, which take no column.
_COLOR_CODES = re.compile(r"\x1b\[[0-9;]*m")

#: Formats a text in a color, or in `bold`.
Styler = Callable[[str, str], str]


def unstyled(text: str, _: str) -> str:
    """Return the text without color."""
    return text


def wrap_parts(parts: Iterable[str], separator: str, indent: str = "") -> Iterator[str]:
    """Join parts, which may be colored, to lines of at most 80 columns. A single part may be longer."""
    line, width = "", 0
    for part in parts:
        size = display_width(_COLOR_CODES.sub("", part))
        if line and width + len(separator) + size > MAX_WIDTH:
            yield line
            line, width, indent = "", 0, "  "
        before = separator if line else indent
        width += len(before) + size
        line += before + part
    if line:
        yield line


def top_reasons(skipped: Mapping[str, int]) -> str:
    """Format the most frequent reasons with their numbers."""
    if len(skipped) == 1:
        return next(iter(skipped))
    top = Counter(skipped).most_common(SHOWN_REASONS)
    if rest := sum(skipped.values()) - sum(count for _, count in top):
        top.append(("other", rest))
    first_blank = next((reason for reason, _ in top if reason.endswith(" blank")), "")
    # "company blank 58, last_name 9": the word is not repeated.
    texts = [f"{reason if reason == first_blank else reason.removesuffix(' blank')} {count:,}" for reason, count in top]
    return ", ".join(texts)


def pad(name: str, width: int) -> str:
    """Fit a name into its column of a terminal. Characters that would move the cursor are replaced."""
    # Combining accents take no width, so the number of characters is limited, too.
    clean = "".join(letter if letter.isprintable() else " " for letter in name[: 4 * width])
    if display_width(clean) >= width or len(name) > len(clean):
        while display_width(clean) > width - 2:
            clean = clean[:-1]
        clean += "…"
    return clean + " " * (width - display_width(clean))


def display_width(name: str) -> int:
    """Return how many terminal columns a name takes: ideographs and emoji two, accents on their own none."""
    return sum(map(_character_width, name))


def _character_width(letter: str) -> int:
    if unicodedata.category(letter) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
