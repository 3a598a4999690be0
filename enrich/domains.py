"""The domain of a URL, an e-mail address or a bare host."""

from __future__ import annotations

import polars as pl

#: No top-level domain is a number: what ends in one is a date, an amount or an IP address.
_HOST_PATTERN = r"^(?:[\p{L}\p{M}\p{N}_-]+\.)+[\p{L}\p{M}\p{N}-]*\p{L}[\p{L}\p{M}\p{N}-]*$"


def extract_domain(text: pl.Expr) -> pl.Expr:
    """Take the domain of a URL, an e-mail address or a bare host, without `www.`; '' when there is none."""
    host = (
        text.str.strip_chars()
        .str.to_lowercase()
        .str.replace(r"^([a-z][a-z0-9+.-]*://|//|mailto:)", "")
        .str.replace(r"(?s)[/?#].*$", "")
        .str.replace(r"^.*@", "")
        .str.replace(r":\d*$", "")
        .str.replace(r"\.$", "")
        .str.replace(r"^www\.(.*\.)", "${1}")
    )
    return host.map_batches(_blank_non_hosts, return_dtype=pl.String)


def _blank_non_hosts(texts: pl.Series) -> pl.Series:
    """Blank what is no host."""
    return texts.set(~texts.str.contains(_HOST_PATTERN), "")
