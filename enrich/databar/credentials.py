"""Finds the API key and the API's base URL in the environment. The key never appears in a message or a repr."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct
from pydantic import SecretStr

from enrich.errors import ApiKeyRejected, JobError
from enrich.job.bounded_read import read_text
from enrich.job.locations import is_loopback

DEFAULT_BASE_URL = "https://api.databar.ai/v1"


class ApiAccess(Struct, frozen=True):
    """Base URL of the API, and the API key."""

    base_url: str
    key: SecretStr

    @property
    def host(self) -> str:
        """The API's host, without the port."""
        return host_of(self.base_url)


def find_access(environ: Mapping[str, str], home: Path) -> ApiAccess:
    """Read `DATABAR_BASE_URL` and the key: `DATABAR_API_KEY`, `DATABAR_API_KEY_FILE`, `~/.databar/config`.

    An empty variable counts as missing. Raises JobError (unusable base URL) or ApiKeyRejected (no usable key).
    """
    return ApiAccess(find_base_url(environ), find_key(environ, home))


def find_base_url(environ: Mapping[str, str]) -> str:
    """Read `DATABAR_BASE_URL`, without trailing slashes. Raises JobError if the key would be sent unencrypted."""
    base_url = environ.get("DATABAR_BASE_URL", "").strip() or DEFAULT_BASE_URL
    try:
        parts = urlsplit(base_url)
        _ = parts.port  # raises if the port is not a number
    except ValueError:
        parts = urlsplit("")
    secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    if not secure or not parts.hostname or parts.username is not None or not base_url.isprintable():
        raise JobError(
            "DATABAR_BASE_URL: must be an https address, or http on loopback",
            f"remove it to use {DEFAULT_BASE_URL}, or use the one that `enrich sandbox` prints",
        )
    return base_url.rstrip("/")


def host_of(base_url: str) -> str:
    """Return the host of a URL, without the port."""
    return urlsplit(base_url).hostname or ""


NO_KEY_HINT = "set DATABAR_API_KEY, or add --sandbox to try it without a key"


def find_key(environ: Mapping[str, str], home: Path) -> SecretStr:
    """Find the key in the documented places, in the documented order. Raises ApiKeyRejected if there is none."""
    if key := environ.get("DATABAR_API_KEY", "").strip():
        return _check_key(key, "DATABAR_API_KEY")
    if name := environ.get("DATABAR_API_KEY_FILE", "").strip():
        if key := _read_key_file(Path(name), "DATABAR_API_KEY_FILE").strip():
            return _check_key(key, f"DATABAR_API_KEY_FILE ({name})")
        raise ApiKeyRejected(f"{name}: the file of DATABAR_API_KEY_FILE is empty", "write the key into it")
    config = home / ".databar" / "config"
    if os.path.isfile(config):  # noqa: PTH113 - os.path.isfile is also False without read permission
        for line in _read_key_file(config, "databar login").splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "api_key" and value.strip():
                return _check_key(value.strip(), str(config))
    raise ApiKeyRejected("no API key in DATABAR_API_KEY, DATABAR_API_KEY_FILE or ~/.databar/config", NO_KEY_HINT)


def _read_key_file(path: Path, source: str) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ApiKeyRejected(f"{path}: the key file of {source} cannot be read: {reason}") from error


def _check_key(key: str, source: str) -> SecretStr:
    """Refuse a key that an HTTP header cannot carry. The message does not show the key."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ApiKeyRejected(f"{source}: the key has invalid characters (line break, space or accent)")
    return SecretStr(key)
