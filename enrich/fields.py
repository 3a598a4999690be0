"""The kinds of values that a job file holds: text, durations, credits, separators, encodings."""

from __future__ import annotations

import re
from datetime import date, datetime, timedelta
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

#: What the ledger can hold, in millionths, as a 64-bit integer.
MAX_CREDITS = 1e12

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(value: object) -> timedelta:
    """Read `90d`, `24h`, `1h30m`, `45s`. Raises ValueError."""
    match = _DURATION.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        raise ValueError("a duration is a number with its unit: 90d, 24h, 30m or 45s")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    try:
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except OverflowError as error:
        raise ValueError("this duration is too long") from error


def check_text(value: object) -> object:
    """Refuse what YAML made of a text that had no quotes."""
    if isinstance(value, bool | int | float | date | datetime) or value is None:
        raise ValueError(f"must be text, but YAML reads it as {_yaml_type_name(value)}: put it in quotes")
    return value


def _yaml_type_name(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", type(None): "nothing"}
    return kinds.get(type(value), "a date")


def _check_credits(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= MAX_CREDITS:
        raise ValueError("must be a number of credits")
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [check_text(value)]


def _check_separator(value: str) -> str:
    if len(value) != 1 or value in '"\r\n\0':
        raise ValueError('must be one character, such as "," or ";" or "\\t", and no quote or line end')
    return value


def _check_encoding(value: str) -> str:
    try:
        "a".encode(value)
    except (LookupError, ValueError) as error:
        raise ValueError("no encoding that is known: use a name such as utf-8, cp1252 or utf-16") from error
    return value


def _check_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        _ = parts.port  # a port that is no number raises
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or not value.isprintable():
        raise ValueError("must be an address that begins with https:// or http://")
    return value


Text = Annotated[str, BeforeValidator(check_text), Field(min_length=1)]
Separator = Annotated[
    str, AfterValidator(_check_separator), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 1})
]
Encoding = Annotated[Text, AfterValidator(_check_encoding)]
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "examples": ["24h", "90d"]}),
]
Credits = Annotated[float, Field(ge=0), BeforeValidator(_check_credits)]
Url = Annotated[Text, AfterValidator(_check_url)]
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
#: A column, or several.
Columns = Annotated[
    list[Text],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1}]}),
]
