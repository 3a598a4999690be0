"""The types of the job file's values: texts, durations, credits, columns, addresses; and the base of its models."""

from __future__ import annotations

import codecs
import os
import re
from datetime import date, datetime, timedelta
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from enrich.job.locations import is_url

#: Maximum number of credits. In millionths it still fits into the ledger's 64-bit integers.
MAX_CREDITS = 1e12

#: A program can wait for this long, and there is a date this far from now.
_MAX_DURATION = timedelta(days=100_000)
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)


def parse_duration(value: object) -> timedelta:
    """Parse a duration such as `90d`, `24h`, `1h30m` or `45s`. Raises ValueError."""
    match = _DURATION.fullmatch(value.replace(" ", "")) if isinstance(value, str) else None
    if match is None or not any(match.groups()):
        raise ValueError("a duration is a number with its unit: 90d, 24h, 30m or 45s")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total_s > _MAX_DURATION.total_seconds():
        raise ValueError(f"this duration is too long: at most {_MAX_DURATION.days}d")
    return timedelta(seconds=total_s)


def check_text(value: object) -> object:
    """Raise ValueError if YAML converted an unquoted text to another type, such as a number or a date."""
    if isinstance(value, bool | int | float | date | datetime) or value is None:
        kinds = {bool: "a boolean", int: "a number", float: "a number", type(None): "nothing"}
        kind = kinds.get(type(value), "a date")
        raise ValueError(f"must be text, but YAML reads it as {kind}: put it in quotes")
    return value


def _check_credits(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= MAX_CREDITS:
        raise ValueError("must be a number of credits")
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [check_text(value)]


def _check_separator(value: str) -> str:
    if len(value) != 1 or value in '"\r\n\0':
        raise ValueError('must be one character, such as "," or ";" or "\\t", and not a quote or line end')
    return value


def is_text_encoding(name: str) -> bool:
    """Return whether Python has an encoding of this name that can write a file piece by piece.

    There are codecs for other things than text (base64), for host names only (idna, punycode), and for Python's
    escapes, which no other program reads.
    """
    piece = "a,1;" * 30 + "\n"
    try:
        encoder = codecs.getincrementalencoder(name)()
        written = b"".join([encoder.encode(piece), encoder.encode(piece, final=True)])
        return written.decode(name) == piece * 2 and not codecs.lookup(name).name.endswith("unicode-escape")
    except (LookupError, ValueError, TypeError):
        return False


def _check_encoding(value: str) -> str:
    if not is_text_encoding(value):
        raise ValueError("unknown encoding: use a name such as utf-8, cp1252 or utf-16")
    return value


def _check_path(value: str) -> str:
    try:
        os.fsencode(value)
    except ValueError:
        value = "\0"
    if "\0" in value:
        raise ValueError("has a character that no file name can have")
    return value


def _check_local(value: str) -> str:
    if is_url(value):
        raise ValueError("must be a file on this machine, not a URL")
    return value


def _check_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        _ = parts.port  # raises if the port is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or not value.isprintable():
        raise ValueError("must be an address that begins with https:// or http://")
    return value


Text = Annotated[str, BeforeValidator(check_text), Field(min_length=1)]
Separator = Annotated[
    str, AfterValidator(_check_separator), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 1})
]
PathText = Annotated[Text, AfterValidator(_check_path)]
LocalPathText = Annotated[PathText, AfterValidator(_check_local)]
Encoding = Annotated[Text, AfterValidator(_check_encoding)]
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "examples": ["24h", "90d"]}),
]
Credits = Annotated[float, Field(ge=0), BeforeValidator(_check_credits)]
Url = Annotated[Text, AfterValidator(_check_url)]
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
#: One column name or a list of them. The value is always a list.
Columns = Annotated[
    list[Text],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1}]}),
]


class StrictModel(BaseModel):
    """Base of all parts of the job file. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, defer_build=True)
