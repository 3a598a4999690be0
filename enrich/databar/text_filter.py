"""Cleans external text before it is truncated, stored, printed or logged. Pure functions, no I/O.

The API key becomes `[key]`. Bidi control characters, which can hide text, are removed. Characters that can control
a terminal (C0, DEL, C1, line and paragraph separators) become spaces. A lone surrogate, which cannot be encoded in a
file, becomes `?`.
"""

from __future__ import annotations

import json
import re

MASK = "[key]"
#: A shorter key is not masked, because it could occur in ordinary data.
MIN_KEY_LENGTH = 6

_BIDI_RANGES = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_CONTROL_RANGES = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029"
_HIDDEN = re.compile(f"[{_BIDI_RANGES}]")
_CONTROL = re.compile(f"[{_CONTROL_RANGES}]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

#: JSON bytes that may need cleaning: the characters above in UTF-8, NUL bytes (other encodings), and every escape
#: except line breaks, tabs and ordinary letters beyond ASCII.
_NEEDS_CLEANING = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xd8\x9c|\xe2\x80[\x8e\x8f\xa8-\xae]|\xe2\x81[\xa6-\xa9]"
    rb"|\\(?:[^nrtu]|u(?:00[0-9]|061c|20[026]|d[89a-f]))",
    re.IGNORECASE,
)
#: Single bytes that always need cleaning, and the beginnings of everything else that may: escapes, and letters beyond
#: ASCII. A search for these is much faster than the pattern.
_CONTROL_BYTES = bytes({*range(0x20), 0x7F} - set(b"\t\n\r"))
_ESCAPE_START = b"\\"
_WIDE_STARTS = (b"\xc2", b"\xd8\x9c", b"\xe2\x80", b"\xe2\x81")
_ESCAPE = re.compile(
    r"\\(?:u(?:(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})|([0-9a-f]{4}))|(.))", re.IGNORECASE | re.DOTALL
)
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STRING_OR_CONSTANT = re.compile(f"{_STRING.pattern}|(-?Infinity|NaN)", re.DOTALL)
_NUMBER = re.compile(r"[0-9.eE+-]+")


def clean_json(body: bytes, key: str) -> bytes:
    """Clean JSON as received, including malformed or deeply nested JSON. Only its strings change."""
    if key.encode() not in body and not _needs_cleaning(body):
        return body
    text = _ESCAPE.sub(_unescape, decode_json(body))
    text = _CONTROL.sub(" ", _HIDDEN.sub("", text))
    if len(key) >= MIN_KEY_LENGTH:
        escaped_key = json.dumps(key)[1:-1]
        if _NUMBER.fullmatch(key):
            text = _STRING.sub(lambda string: string[0].replace(escaped_key, MASK), text)
        else:
            text = text.replace(escaped_key, MASK)
    return text.encode(errors="replace")


def decode_json(body: bytes) -> str:
    """Decode JSON as received: UTF-8, UTF-16 or UTF-32, with or without a BOM. Invalid bytes become U+FFFD."""
    return body.decode(json.detect_encoding(body), errors="replace")


def nan_as_null(text: str) -> str:
    """Replace NaN and Infinity, which JSON does not have, with null."""
    if "NaN" not in text and "Infinity" not in text:
        return text
    return _STRING_OR_CONSTANT.sub(lambda found: "null" if found[1] else found[0], text)


def _needs_cleaning(body: bytes) -> bool:
    is_suspect = (
        _ESCAPE_START in body
        or len(body.translate(None, _CONTROL_BYTES)) < len(body)
        or (not body.isascii() and any(map(body.__contains__, _WIDE_STARTS)))
    )
    return is_suspect and _NEEDS_CLEANING.search(body) is not None


def clean_text(text: str, key: str = "") -> str:
    """Clean text, which may have several lines."""
    text = _LONE_SURROGATE.sub("?", _CONTROL.sub(" ", _HIDDEN.sub("", text)))
    return text.replace(key, MASK) if len(key) >= MIN_KEY_LENGTH else text


def clean_line(text: str, key: str = "") -> str:
    """Clean text and return it as one line of printable characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in clean_text(text, key)).split())


def _unescape(escape: re.Match[str]) -> str:
    """Replace an escape with its character if that is ASCII or needs cleaning."""
    _, pair, code, letter = escape.groups()
    if pair:
        return escape[0]
    if letter:
        return {"b": " ", "f": " ", "/": "/"}.get(letter, escape[0])
    character = chr(int(code, 16))
    if character in "\t\n\r":
        return escape[0]
    if character in '"\\':
        return f"\\{character}"
    return character if character.isascii() or clean_text(character) != character else escape[0]
