"""Converts values to JSON text and back."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

import msgspec


def to_json_text(value: object) -> str:
    """Convert a value to JSON text. Raises RecursionError if it is nested too deeply."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, UnicodeEncodeError):  # msgspec rejects lone surrogates, and subclasses of `str`
        return json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()


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
