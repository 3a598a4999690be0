"""Parses JSON of the API, as received or from the ledger, with numbers of any size. Pure functions, no I/O."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

import msgspec


def parse_json(text: str) -> Any:  # noqa: ANN401 - a JSON document can be any type
    """Parse JSON. A number that Python cannot hold becomes text. Raises ValueError, and RecursionError."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return _JSON_DECODER.decode(text)


def _parse_integer(written: str) -> int | str:
    try:
        return int(written)
    except ValueError:  # more than 4,300 digits
        return written


def _parse_float(written: str) -> float | str:
    number = float(written)
    return number if isfinite(number) else written


_JSON_DECODER = json.JSONDecoder(parse_int=_parse_integer, parse_float=_parse_float)


def whole_number(value: object) -> int | None:
    """Return a whole number from the API, such as 2 or 2.0. None for any other value, such as true."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
