"""Reads the environment: the API key, the base URL of the API, the proxy, and the trusted certificates.

The key never appears in a message or a repr. Proxy variables have the same meaning as in curl. `~/.netrc` and
`REQUESTS_CA_BUNDLE` are ignored.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit

from msgspec import Struct
from pydantic import SecretStr

from enrich.errors import UNREADABLE_HINT, ApiKeyRejected, JobError
from enrich.job.local_files import read_text
from enrich.job.locations import is_loopback, parse_ip

if TYPE_CHECKING:
    import ssl

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
        raise ApiKeyRejected(f"{path}: the key file of {source} cannot be read: {reason}", UNREADABLE_HINT) from error


def _check_key(key: str, source: str) -> SecretStr:
    """Refuse a key that an HTTP header cannot carry. The message does not show the key."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        message = f"{source}: the key has invalid characters (line break, space or accent)"
        raise ApiKeyRejected(message, "copy it again from Databar, without anything around it")
    return SecretStr(key)


#: Port per scheme for a proxy URL without a port, as in curl.
DEFAULT_PORTS = {"http": 1080, "https": 443}
_NO_CERTIFICATE = "it has no readable certificate (PEM)"
#: OpenSSL looks up a certificate in a folder by file name: the hash of its subject.
_HASHED_NAME = re.compile(r"[0-9a-f]{8}\.\d+")


class Proxy(Struct, frozen=True):
    """A proxy from the environment `variable`. `url` holds no password; `authorization` is the value of the header."""

    url: str
    variable: str
    authorization: SecretStr | None = None


def find_proxy(environ: Mapping[str, str], base_url: str) -> Proxy | None:
    """Return the proxy for a URL; None: connect directly. Raises JobError, which names the variable, not its value."""
    target = urlsplit(base_url)
    host = (target.hostname or "").removesuffix(".")
    if is_loopback(host):
        return None
    found = _first_variable(environ, f"{target.scheme}_proxy", "all_proxy")
    if found is None:
        return None
    port = target.port or (443 if target.scheme == "https" else 80)
    exempt = _first_variable(environ, "no_proxy")
    if exempt is not None and _is_exempt(host, port, exempt[1]):
        return None
    return _parse_proxy(*found)


def _first_variable(environ: Mapping[str, str], *names: str) -> tuple[str, str] | None:
    """Return the name and value of the first non-empty variable. Lower case takes precedence over upper case."""
    for name in names:
        # Ignore HTTP_PROXY: in a CGI process it can come from a client's `Proxy:` header.
        for variable in (name,) if name == "http_proxy" else (name, name.upper()):
            if value := environ.get(variable, "").strip():
                return variable, value
    return None


def _parse_proxy(variable: str, value: str) -> Proxy:
    scheme, _, rest = value.partition("://") if "://" in value else ("http", "", value)
    scheme = scheme.lower()
    if scheme not in DEFAULT_PORTS:
        raise JobError(
            f"{variable}: proxies of this kind are not supported{f': {scheme}://' if scheme.isalnum() else ''}",
            f"set an http:// or https:// proxy in {variable}, or exempt the API's host in no_proxy",
        )
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, port = parts.hostname or "", DEFAULT_PORTS[scheme] if parts.port is None else parts.port
    except ValueError:
        host, port = "", 0
    if not port or not re.fullmatch(r"[\w.:%-]+", host):
        raise JobError(
            f"{variable}: not a proxy address",
            "write http://HOST:PORT, with special characters in user and password percent-encoded",
        )
    authorization = None
    if parts.username or parts.password:
        pair = unquote_to_bytes(parts.username or "") + b":" + unquote_to_bytes(parts.password or "")
        authorization = SecretStr("Basic " + base64.b64encode(pair).decode())
    return Proxy(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", variable, authorization)


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Check whether the `no_proxy` list contains a host (lower case, no brackets)."""
    address = parse_ip(host)
    return any(
        entry == "*"
        or (only_port in (None, port) and (_in_network(address, entry) if address else _in_domain(host, entry)))
        for entry, only_port in _parse_no_proxy(no_proxy)
    )


def _parse_no_proxy(no_proxy: str) -> Iterator[tuple[str, int | None]]:
    """Yield each host, domain or network of the list with its port. The port is None if there is none."""
    for entry in no_proxy.lower().replace(",", " ").split():
        if match := re.fullmatch(r"\[([^]]+)\](?::([0-9]+))?|([^:]+):([0-9]+)", entry):
            yield match[1] or match[3], int(match[2] or match[4]) if match[2] or match[4] else None
        else:
            yield re.sub(r"[][]", "", entry), None


def _in_network(address: IPv4Address | IPv6Address, entry: str) -> bool:
    if "/" not in entry:
        return parse_ip(entry) == address
    try:
        return address in ip_network(entry, strict=False)
    except ValueError:
        return False


def _in_domain(host: str, entry: str) -> bool:
    domain = entry.removeprefix("*").strip(".")
    return bool(domain) and (host == domain or host.endswith("." + domain))


def load_certificates(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """Return a TLS context that trusts `SSL_CERT_FILE` and `SSL_CERT_DIR`; None: neither is set. Raises JobError."""
    file, folders = environ.get("SSL_CERT_FILE", ""), environ.get("SSL_CERT_DIR", "")
    if not file and not folders:
        return None
    import ssl  # noqa: PLC0415 - slow to import, and commands without network use this file, too

    if file:
        _check_file(Path(file))
    if folders:
        _check_folders(folders)
    try:
        context = ssl.create_default_context(cafile=file or None, capath=folders or None)
    except OSError as error:
        raise _unusable_error("SSL_CERT_FILE", file, _NO_CERTIFICATE) from error
    if file and not context.cert_store_stats()["x509"]:
        raise _unusable_error("SSL_CERT_FILE", file, _NO_CERTIFICATE)
    return context


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():  # reading a pipe or a device could block forever
            raise _unusable_error("SSL_CERT_FILE", path, "not a file" if path.exists() else "no such file")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        raise _unusable_error("SSL_CERT_FILE", path, getattr(error, "strerror", None) or str(error)) from error


def _check_folders(folders: str) -> None:
    """Raise JobError unless one of the folders has a certificate. OpenSSL ignores an empty folder without an error."""
    reasons = []
    for folder in folders.split(os.pathsep):
        try:
            if any(_HASHED_NAME.fullmatch(name) for name in os.listdir(folder or ".")):  # noqa: PTH208 - only names are needed
                return
            reasons.append("it has no certificate with a hash as its name (run `openssl rehash`)")
        except (OSError, ValueError) as error:
            reasons.append(getattr(error, "strerror", None) or str(error))
    raise _unusable_error("SSL_CERT_DIR", folders, reasons[0])


def _unusable_error(variable: str, path: object, reason: str) -> JobError:
    return JobError(f"{variable}: {path}: {reason}", f"correct the path, or unset {variable}")
