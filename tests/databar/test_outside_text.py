"""How text from outside is cleaned: JSON, plain text, and the key inside them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from enrich.databar import responses
from enrich.databar.text_filter import MASK, clean_json, clean_line, clean_text, nan_as_null
from tests.support.cases import in_turn

KEY = 'k-1/"x\\7'
REMOVED = "\u202a\u202e\u2066\u2069\u200e\u200f\u061c"
BLANKED = "\0\x01\x08\x0b\x0c\x1b\x1f\x7f\x80\x9b\x9f\u2028\u2029"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just(f"<{KEY}>"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.just(KEY), inner, max_size=4),
    max_leaves=12,
)


def expected(value: Any) -> Any:
    """Clean parsed JSON string by string, the expected result."""
    if isinstance(value, dict):
        return {expected(name): expected(item) for name, item in value.items()}
    if isinstance(value, list):
        return list(map(expected, value))
    return clean_text(value, KEY) if isinstance(value, str) else value


@given(value=JSON, ascii_only=st.booleans())
def test_json_strings_are_cleaned(value: Any, *, ascii_only: bool) -> None:
    """Cleaning raw JSON gives the same values as cleaning each parsed string, however it is written."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert json.loads(clean_json(body, KEY)) == expected(json.loads(body))


@given(body=st.binary(max_size=60) | st.text('{}[]":,\\ub6f\0\u202e' + KEY, max_size=60).map(str.encode))
def test_broken_json_is_cleaned(body: bytes) -> None:
    """Whatever the bytes are, no key and no control character stays, and cleaning twice changes nothing."""
    clean = clean_json(body, KEY)
    assert KEY.encode() not in clean
    assert json.dumps(KEY)[1:-1].encode() not in clean
    if b"\\" not in clean and b"\0" not in body:
        assert clean_text(clean.decode(errors="replace")) == clean.decode(errors="replace")


@in_turn(
    "written",
    ["key-0000-0001", r"\u006bey-0000-0001", r"\u006Bey\u002d0000-0001", r"key\u202e-0000-0001", "key-0000-\u200f0001"],
)
def test_key_is_found_in_all_spellings(written: str) -> None:
    """The key is found as an escape, as an object's key, and with invisible characters inside."""
    for body in (f'{{"a": ["x{written}y"]}}', f'{{"{written}": 1}}', f'{{"a": "x{written}'):
        clean = clean_json(body.encode(), "key-0000-0001").decode()
        assert "0001" not in clean
        assert MASK in clean


def test_clean_text_is_unchanged() -> None:
    """Clean text keeps its bytes: long numbers, accents, emoji, line breaks and tabs."""
    body = '{"n": 12345678901234567890123, "s": "caf\u00e9 \\u00e9 \\ud83d\\ude00 😀\\n\\t \u2019", "f": 1.10}'.encode()
    assert clean_json(body, KEY) == body


def test_numeric_key_keeps_numbers() -> None:
    """A key of digits is replaced in strings only, so that JSON stays valid."""
    assert clean_json(b'{"a": 12345678, "b": "12345678"}', "12345678") == b'{"a": 12345678, "b": "[key]"}'


def test_utf16_and_utf32_json_is_cleaned() -> None:
    """JSON in UTF-16 and UTF-32, where the key has other bytes, is cleaned."""
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig"):
        assert json.loads(clean_json(json.dumps({"a": f"{KEY}\u202e"}).encode(encoding), KEY)) == {"a": MASK}


def test_nan_is_null() -> None:
    """NaN and Infinity, which JSON does not have, become null, except inside strings."""
    text = r'{"NaN": [NaN, -Infinity, Infinity, "-Infinity \" NaN"], "\"NaN'
    assert nan_as_null(text) == r'{"NaN": [null, null, null, "-Infinity \" NaN"], "\"NaN'


def test_deep_nesting_is_cleaned() -> None:
    """Deep nesting is cleaned without recursion."""
    clean = clean_json(b"[" * 100_000 + json.dumps(KEY).encode(), KEY)
    assert clean == b"[" * 100_000 + json.dumps(MASK).encode()


def test_control_and_bidi_characters() -> None:
    """Control and bidi characters are removed; line breaks and tabs stay unless one line is required."""
    assert clean_text(f"a{REMOVED}b{BLANKED}c\r\n\td\ud800") == f"ab{' ' * len(BLANKED)}c\r\n\td?"
    assert clean_line(f" a\n{BLANKED}b\t\u200bc\ud800 {KEY}", KEY) == f"a b c? {MASK}"


def depth_of(value: Any) -> int:
    """Count the levels of lists and objects."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


@given(rows=st.lists(JSON, max_size=3), wrappers=st.text("[{", min_size=0, max_size=230), copies=st.integers(1, 300))
@example(rows=[1], wrappers="[{" * 99, copies=1)
@example(rows=[1], wrappers="[{" * 100, copies=1)
@example(rows=["[" * 300], wrappers="", copies=1)
@example(rows=["\\", "]"], wrappers="[" * 199, copies=1)
def test_depth_is_checked(rows: list[Any], wrappers: str, copies: int) -> None:
    """A body with more than 200 levels is refused, one with less never, whatever its strings contain."""
    value: Any = rows * copies
    for wrapper in wrappers:
        value = [value] if wrapper == "[" else {"a": value}
    body = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    depth = depth_of(value)
    if depth > responses.MAX_DEPTH:
        with pytest.raises(ValueError, match="nested"):
            responses.parse_body(body, KEY)
    elif depth < responses.MAX_DEPTH:
        responses.parse_body(body, KEY)
