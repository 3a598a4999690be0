"""Downloads an input from a web address. Has the HTTP client for other hosts than the API: no API key, no cookies."""

from __future__ import annotations

import os
import re
import time
from functools import cache
from typing import BinaryIO

import httpx

from enrich import __version__
from enrich.databar.environment import find_proxy, load_certificates
from enrich.databar.text_filter import clean_line
from enrich.errors import CommandRefused
from enrich.job.locations import WebUrl, is_loopback

#: The largest download in bytes, after it was unpacked.
MAX_BYTES = 4 << 30
#: The longest time for a download, and for the server's next bytes, in seconds.
MAX_SECONDS, READ_TIMEOUT_S = 600.0, 60.0
MAX_REDIRECTS = 10
TRIES = 3
RETRY_PAUSE_S = 1.0
#: Statuses of a server that may answer later.
_TRANSIENT_STATUSES = frozenset((408, 425, 429, 500, 502, 503, 504))
_LOGIN_HINT = (
    "open the link in a private window: it must download the file without a login. "
    "For Google Sheets share it with everyone who has the link, and take …/export?format=csv"
)
#: How a page begins, after a byte order mark and blanks.
_PAGE = re.compile(rb"[\xef\xbb\xbf\xff\xfe\0\s]*<\0?[!?/a-z]", re.IGNORECASE)
_CHECKED_BYTES = 1024
#: Loaded once: that takes 20 ms, and each redirect opens a client.
_default_certificates = cache(httpx.create_ssl_context)


class _Transient(Exception):
    """The download failed in a way that may pass. The text is the reason."""


def download(url: WebUrl, into: BinaryIO) -> None:
    """Download a table. Follows redirects. Raises CommandRefused, with the reason and without the whole address."""
    deadline = time.monotonic() + MAX_SECONDS
    for number in range(TRIES):
        time.sleep(RETRY_PAUSE_S * number)
        into.seek(0)
        into.truncate()
        try:
            _download_once(url, into, deadline)
        except _Transient as failure:
            reason = str(failure)
        else:
            return
    raise CommandRefused(f"{url} cannot be read: {reason}", "check the address and the network, then run again")


def _download_once(url: WebUrl, into: BinaryIO, deadline: float) -> None:
    try:
        address = httpx.URL(url.url)
    except httpx.InvalidURL:
        raise CommandRefused(f"{url} is not the address of a server", "check the address") from None
    for _ in range(MAX_REDIRECTS + 1):
        # A client for each address has the right proxy, and no cookies.
        with open_web_client(str(address), timeout_s=READ_TIMEOUT_S) as http:
            try:
                with http.stream("GET", address, headers={"user-agent": f"enrich/{__version__}"}) as response:
                    if response.next_request is None:
                        _check_status(url, address, response.status_code)
                        _copy(url, address, response, into, deadline)
                        return
                    address = _check_redirect(url, address, response.next_request.url)
            except httpx.HTTPError as error:
                raise _Transient(_describe(error)) from None
    raise CommandRefused(f"{url} redirects more than {MAX_REDIRECTS} times", _LOGIN_HINT)


def _check_redirect(url: WebUrl, address: httpx.URL, target: httpx.URL) -> httpx.URL:
    """Return the target of a redirect, without user and password. Raises CommandRefused for an address without TLS."""
    if target.scheme != "https" and not (is_loopback(address.host) and is_loopback(target.host)):
        raise CommandRefused(f"{url} redirects to an address that is not https://: {clean_line(target.host)}")
    return target.copy_with(username=None, password=None)


def _check_status(url: WebUrl, address: httpx.URL, status: int) -> None:
    if status == httpx.codes.OK:
        return
    where = _name_host(url, address)
    if status in _TRANSIENT_STATUSES:
        raise _Transient(f"HTTP {status}{where}")
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise CommandRefused(f"{url} needs a login: HTTP {status}{where}", _LOGIN_HINT)
    if status in (httpx.codes.NOT_FOUND, httpx.codes.GONE):
        raise CommandRefused(f"{url} does not exist: HTTP {status}{where}", "check the address")
    raise CommandRefused(f"{url} cannot be read: HTTP {status}{where}", "check the address")


def _copy(url: WebUrl, address: httpx.URL, response: httpx.Response, into: BinaryIO, deadline: float) -> None:
    beginning, size = b"", 0
    for chunk in response.iter_bytes():
        if len(beginning) < _CHECKED_BYTES:
            beginning += chunk[:_CHECKED_BYTES]
            if _PAGE.match(beginning):
                message = f"{url} is a web page, not a table{_name_host(url, address)}"
                raise CommandRefused(message, _LOGIN_HINT)
        size += len(chunk)
        if size > MAX_BYTES:
            raise CommandRefused(f"{url} has more than {MAX_BYTES:,} bytes", "split it, or download it yourself")
        if time.monotonic() > deadline:
            message = f"{url} takes longer than {MAX_SECONDS / 60:.0f} minutes"
            raise CommandRefused(message, "split it, or download it yourself")
        into.write(chunk)


def _name_host(url: WebUrl, address: httpx.URL) -> str:
    """Return the host that answered, if it is another one than that of the address."""
    return "" if address.host == httpx.URL(url.url).host else f" (from {clean_line(address.host)})"


def _describe(error: httpx.HTTPError) -> str:
    """Describe an error without its text, which may hold the address."""
    match error:
        case httpx.TimeoutException():
            return "the server does not respond in time"
        case httpx.ConnectError():
            return "the server cannot be reached"
    return f"the connection failed ({type(error).__name__})"


def open_web_client(url: str, *, timeout_s: float, follow_redirects: bool = False) -> httpx.Client:
    """Open a client with the environment's proxy and certificates. Raises JobError if one of them is unusable."""
    found = find_proxy(os.environ, url)
    tls = (url.startswith("https:") and load_certificates(os.environ)) or _default_certificates(trust_env=False)
    proxy = None
    if found is not None:
        key = found.authorization
        headers = {"proxy-authorization": key.get_secret_value()} if key else None
        proxy = httpx.Proxy(found.url, headers=headers, ssl_context=tls if found.url.startswith("https:") else None)
    return httpx.Client(timeout=timeout_s, follow_redirects=follow_redirects, trust_env=False, proxy=proxy, verify=tls)
