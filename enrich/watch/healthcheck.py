"""Pings a healthcheck (healthchecks.io and its like): started, fine, failed. Never holds up the run."""

from __future__ import annotations

import os
import time
from uuid import uuid4

import httpx

from enrich.api.network import find_certificates, find_proxy
from enrich.errors import JobError
from enrich.watch.aside import Aside
from enrich.watch.outcome import FINE, SILENT

TRIES = 3
TRY_S = 5.0
PAUSE_S = 0.5
#: The end of a run waits so long for its pings.
PATIENCE_S = 10.0


class Healthcheck:
    """The pings of one run, which share a run id. Only the URL's host may be shown: its path is a secret."""

    def __init__(self, url: str) -> None:
        """Take the address. Raises ValueError, which does not show it, when nobody can be asked there."""
        try:
            self._url = httpx.URL(url)
        except httpx.InvalidURL:
            raise ValueError("must be an address that can be asked") from None
        self._run_id = str(uuid4())
        self._started: Aside | None = None

    def start(self) -> None:
        """Say that a run begins, without waiting."""
        self._started = Aside(lambda: self._ping("/start", ""))

    def end(self, code: int, text: str) -> str | None:
        """Say how it ended; return what went wrong, None when all arrived."""
        if code in SILENT:
            return None
        latest = time.monotonic() + PATIENCE_S
        before = self._started.wait(PATIENCE_S / 2) if self._started else None
        path = "" if code in FINE else "/fail"
        problem = Aside(lambda: self._ping(path, text)).wait(latest - time.monotonic()) or before
        return f"the healthcheck at {self._url.host} was not told: {problem}" if problem else None

    def _ping(self, path: str, text: str) -> str | None:
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path).copy_merge_params({"rid": self._run_id})
        problem: str | None = None
        try:
            found = find_proxy(os.environ, str(url))
            tls = (url.scheme == "https" and find_certificates(os.environ)) or httpx.create_ssl_context(trust_env=False)
        except JobError as error:
            return error.message
        proxy = None
        if found is not None:
            key = found.authorization
            headers = {"proxy-authorization": key.get_secret_value()} if key else None
            proxy = httpx.Proxy(found.url, headers=headers, ssl_context=tls if found.url.startswith("https:") else None)
        with httpx.Client(timeout=TRY_S, follow_redirects=True, trust_env=False, proxy=proxy, verify=tls) as http:
            for number in range(TRIES):
                time.sleep(PAUSE_S * number)
                try:
                    response = http.post(url, content=text.encode())
                except httpx.HTTPError as error:
                    problem = type(error).__name__  # its text may hold the URL
                    continue
                problem = None if response.is_success else f"HTTP {response.status_code}"
                if not response.is_server_error:
                    break
        return problem
