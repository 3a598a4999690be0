"""Hints for a misspelled name: the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def suggest_name(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the closest known name, or with all known names if they are few. None: no hint."""
    names = list(dict.fromkeys(known))
    if (closest := closest_name(name, names)) is not None:
        return did_you_mean(closest)
    max_listed = 12
    return f"known: {', '.join(names)}" if 0 < len(names) <= max_listed else None


def did_you_mean(name: str) -> str:
    """Return the hint that this name may be meant. Signs that cannot be seen are escaped."""
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)
    return f"did you mean `{shown}`?"


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a name; None: none is."""
    by_fold = {candidate.casefold(): candidate for candidate in known}
    close = get_close_matches(name.casefold(), by_fold, n=1, cutoff=0.6)
    return by_fold[close[0]] if close else None
