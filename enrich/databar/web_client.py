"""Opens HTTP clients for other hosts than the API: with the environment's proxy and certificates, without the key."""

from __future__ import annotations

import os

import httpx

from enrich.databar.network import find_proxy, load_certificates


def open_web_client(url: str, *, timeout_s: float, follow_redirects: bool = False) -> httpx.Client:
    """Open a client for a URL. Raises JobError for an unusable proxy or certificate."""
    found = find_proxy(os.environ, url)
    tls = (url.startswith("https:") and load_certificates(os.environ)) or httpx.create_ssl_context(trust_env=False)
    proxy = None
    if found is not None:
        key = found.authorization
        headers = {"proxy-authorization": key.get_secret_value()} if key else None
        proxy = httpx.Proxy(found.url, headers=headers, ssl_context=tls if found.url.startswith("https:") else None)
    return httpx.Client(timeout=timeout_s, follow_redirects=follow_redirects, trust_env=False, proxy=proxy, verify=tls)
