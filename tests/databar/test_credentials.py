"""Where the key and the base URL come from; the key is never shown."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from pydantic import SecretStr

from enrich.databar.environment import DEFAULT_BASE_URL, ApiAccess, find_access, find_base_url, find_key
from enrich.errors import ApiKeyRejected, JobError
from tests.support.cases import in_turn

KEY = "key-5b1f0e77-that-nobody-may-see"


def write_login(home: Path, text: str) -> None:
    """Write the file that `databar login` writes."""
    folder = home / ".databar"
    folder.mkdir()
    (folder / "config").write_text(text, encoding="utf-8")


def test_key_lookup_order(tmp_path: Path) -> None:
    """The key variable comes first, then the file that a variable names, then the file of `databar login`."""
    file = tmp_path / "key"
    file.write_text("from-file\n", encoding="utf-8")
    write_login(tmp_path, "user = ada\napi_key = from-login\n")
    environ = {"DATABAR_API_KEY": " from-variable ", "DATABAR_API_KEY_FILE": str(file)}

    assert find_key(environ, tmp_path).get_secret_value() == "from-variable"
    assert find_key(environ | {"DATABAR_API_KEY": ""}, tmp_path).get_secret_value() == "from-file"
    assert find_key({"DATABAR_API_KEY": " ", "DATABAR_API_KEY_FILE": ""}, tmp_path).get_secret_value() == "from-login"


@in_turn("text", ["", "\n", "api_key=\n", "api_key\n", "other=KEY\n", "# api_key=KEY\n"])
def test_login_file_without_key(tmp_path: Path, text: str) -> None:
    """The message lists the places that were searched and how to try the sandbox."""
    write_login(tmp_path, text)
    with pytest.raises(ApiKeyRejected, match="no API key") as caught:
        find_key({}, tmp_path)
    assert "--sandbox" in (caught.value.hint or "")


@in_turn("text", [KEY, f"{KEY}\r\n", f"\ufeff{KEY}\n", f"\n  {KEY}\t\n"])
def test_key_file_whitespace_and_bom(tmp_path: Path, text: str) -> None:
    """Whitespace and a byte order mark that editors add are not part of the key."""
    file = tmp_path / "key"
    file.write_text(text, encoding="utf-8", newline="")
    assert find_key({"DATABAR_API_KEY_FILE": str(file)}, tmp_path).get_secret_value() == KEY


def test_unreadable_key_file(tmp_path: Path) -> None:
    """A named key file that can't be read is an error; no other place is tried."""
    write_login(tmp_path, f"api_key={KEY}")
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.touch()
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in [
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (empty, "is empty"),
        (binary, "it is not text"),
    ]:
        with pytest.raises(ApiKeyRejected, match=reason) as caught:
            find_key({"DATABAR_API_KEY_FILE": str(path)}, tmp_path)
        assert str(path) in caught.value.message


@in_turn("key", [f"{KEY}\nx", f"{KEY} x", f"{KEY}é", f"{KEY}\x00", f"{KEY}\x7f", f"{KEY}\u200b"])
def test_invalid_key_characters(tmp_path: Path, key: str) -> None:
    """A key with a line break or a space inside is refused before anything is sent, without being shown."""
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    for environ in ({"DATABAR_API_KEY": key}, {"DATABAR_API_KEY_FILE": str(file)}):
        with pytest.raises(ApiKeyRejected, match="invalid characters") as caught:
            find_key(environ, tmp_path)
        assert KEY not in "".join(traceback.format_exception(caught.value)) + str(caught.value.hint)


def test_key_is_not_in_repr() -> None:
    """The key is not in the repr, so logs and tracebacks don't show it."""
    access = ApiAccess(DEFAULT_BASE_URL, SecretStr(KEY))
    assert KEY not in f"{access} {access!r} {access.key}"


@in_turn(
    ("base_url", "host"),
    [
        ("https://api.databar.ai/v1", "api.databar.ai"),
        ("https://api.databar.ai/v1/", "api.databar.ai"),
        ("HTTPS://API.databar.ai:8443/v1", "api.databar.ai"),
        ("http://127.0.0.1:8080/v1", "127.0.0.1"),
        ("http://127.9.9.9/v1", "127.9.9.9"),
        ("http://localhost:1/v1", "localhost"),
        ("http://[::1]:1/v1", "::1"),
        (" https://api.databar.ai/v1\n", "api.databar.ai"),
    ],
)
def test_base_url_https_or_loopback(tmp_path: Path, base_url: str, host: str) -> None:
    """The base URL must be HTTPS or loopback: the key never leaves the machine unencrypted."""
    access = find_access({"DATABAR_BASE_URL": base_url, "DATABAR_API_KEY": KEY}, tmp_path)
    assert access.host == host
    assert not access.base_url.endswith(("/", "\n"))


@in_turn("base_url", [None, "", " "])
def test_default_base_url(tmp_path: Path, base_url: str | None) -> None:
    """An empty variable counts as missing, and the default URL is used."""
    environ = {"DATABAR_API_KEY": KEY} | ({} if base_url is None else {"DATABAR_BASE_URL": base_url})
    assert find_access(environ, tmp_path).base_url == DEFAULT_BASE_URL


@in_turn(
    "base_url",
    [
        "http://api.databar.ai/v1",
        "http://localhost.evil.example/v1",
        "http://127.0.0.1.nip.io/v1",
        "http://2130706433/v1",
        "http://0.0.0.0/v1",
        "ftp://127.0.0.1/v1",
        "api.databar.ai/v1",
        "//api.databar.ai/v1",
        "https://",
        "https:///v1",
        "https://api.databar.ai:port/v1",
        "https://api.databar.ai:99999/v1",
        "https://[::1/v1",
        "https://ada:pw@api.databar.ai/v1",
        "https://api.data\nbar.ai/v1",
        "https://api.databar.ai/v1\x00",
    ],
)
def test_invalid_base_url(base_url: str) -> None:
    """An invalid base URL is refused before anything is sent; the hint shows what to write instead."""
    with pytest.raises(JobError, match="must be an https address, or http on loopback") as caught:
        find_base_url({"DATABAR_BASE_URL": base_url})
    assert DEFAULT_BASE_URL in (caught.value.hint or "")
