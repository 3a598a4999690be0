"""Opens HTTP clients for other hosts than the API: with the environment's proxy and certificates, without the key."""

from __future__ import annotations

import os
from functools import cache

import httpx

from enrich.databar.network import find_proxy, load_certificates

#: Loaded once: that takes 20 ms, and each redirect opens a client.
_default_certificates = cache(httpx.create_ssl_context)


def open_web_client(url: str, *, timeout_s: float, follow_redirects: bool = False) -> httpx.Client:
    """Open a client for a URL. Raises JobError for an unusable proxy or certificate."""
    found = find_proxy(os.environ, url)
    tls = (url.startswith("https:") and load_certificates(os.environ)) or _default_certificates(trust_env=False)
    proxy = None
    if found is not None:
        key = found.authorization
        headers = {"proxy-authorization": key.get_secret_value()} if key else None
        proxy = httpx.Proxy(found.url, headers=headers, ssl_context=tls if found.url.startswith("https:") else None)
    return httpx.Client(timeout=timeout_s, follow_redirects=follow_redirects, trust_env=False, proxy=proxy, verify=tls)
