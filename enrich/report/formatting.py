"""Formats numbers, times and names for the page. An unknown value is a dash, never 0."""

from __future__ import annotations

import unicodedata
from datetime import datetime

from enrich.models import STATUS_WORDS, format_credits
from enrich.report.data import ratio

DASH = "\N{EN DASH}"
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
BLANK_LABEL = "(blank)"
MINUTE_S = 60.0
HOUR_S = 3600.0
#: The last two code points of each Unicode plane end in FFFE and FFFF; they are noncharacters.
LAST_OF_PLANE = 0xFFFE
#: Words of the page for states and row statuses; the others are their own.
STATUS_LABELS = {**STATUS_WORDS, "found": "match"}
#: From this amount on, charts show whole credits.
LARGE_CREDITS = 10_000


def format_status(status: str) -> str:
    """Format a state of a request or a status of a row."""
    return STATUS_LABELS.get(status, clean_text(status))


def format_count(number: float | None) -> str:
    """Format a whole number."""
    return DASH if number is None else f"{number:,.0f}"


def format_amount(amount: float | None) -> str:
    """Format an amount of credits, without the unit."""
    return DASH if amount is None else format_credits(amount)


def format_percent(share: float | None) -> str:
    """Format a share (0 to 1) as a percentage."""
    return DASH if share is None else f"{share:.1%}"


def format_share(part: float, whole: float) -> str:
    """Format the part as a percentage of the whole; a dash when the whole is 0."""
    return format_percent(ratio(part, whole))


def format_seconds(time_s: float | None) -> str:
    """Format a duration, with no-break spaces."""
    if time_s is None:
        return DASH
    if time_s < MINUTE_S:
        return f"{time_s:.1f}".removesuffix(".0") + f"{NO_BREAK_SPACE}s"
    minutes, rest = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}{NO_BREAK_SPACE}h{NO_BREAK_SPACE}{minutes:02}{NO_BREAK_SPACE}min"
    seconds = f"{NO_BREAK_SPACE}{rest:02}{NO_BREAK_SPACE}s" if rest else ""
    return f"{minutes}{NO_BREAK_SPACE}min{seconds}"


def format_time(iso: str) -> str:
    """Format an ISO time to the minute."""
    at = datetime.fromisoformat(iso)
    return f"{at.day} {at:%b %Y, %H:%M}"


def format_day(iso: str) -> str:
    """Format the day of an ISO time, without the year."""
    at = datetime.fromisoformat(iso)
    return f"{at.day} {at:%b}"


def format_date(iso: str) -> str:
    """Format the day of an ISO time, with the year."""
    at = datetime.fromisoformat(iso)
    return f"{at.day}{NO_BREAK_SPACE}{at:%b}{NO_BREAK_SPACE}{at:%Y}"


def clean_text(text: str, otherwise: str = "(no name)") -> str:
    """Remove the characters that XML forbids: they would make the drawing library abort the process."""
    printable = "".join(" " if _is_forbidden(each) else each for each in text)
    return " ".join(printable.split()) or otherwise


def text_width(text: str, size: float) -> float:
    """Estimate the width of a text in pixels for common fonts; it is more often too large than too small."""
    return sum(map(_em_width, text)) * size


def fit_text(text: str, room: float, size: float) -> str:
    """Shorten a text with an ellipsis until it fits into `room` pixels."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(f"{text}…", size) > room:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _em_width(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF" or ord(character) > 0x2E80:  # noqa: PLR2004 - where ideographs begin
        return 1.3
    if character in f"{NO_BREAK_SPACE} .,:;·()'|!iljI":
        return 0.42
    return 1.0 if character in "MWmw@%" else 0.66


def _is_forbidden(character: str) -> bool:
    """Return True for control characters, surrogates, noncharacters and marks that change the text direction."""
    if unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or ord(character) & LAST_OF_PLANE == LAST_OF_PLANE:
        return True
    return unicodedata.bidirectional(character) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
