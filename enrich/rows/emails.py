"""Finds the one plausible e-mail address in a cell. Only the API can say which addresses exist."""

from __future__ import annotations

import re

import polars as pl

from enrich.job.cell_text import convert_some, map_distinct
from enrich.models import LeftOut
from enrich.rows.domains import LEFT_OUT, find_addresses, unusual_emails

#: Longest local part and longest address (RFC 5321).
_MAX_LOCAL_LENGTH, _MAX_LENGTH = 64, 254

#: Words with single dots between them. Letters of any script.
_LOCAL = re.compile(r"[\w!#$%&'*+=^`{}~-]+(?:\.[\w!#$%&'*+=^`{}~-]+)*")


def email_addresses(cells: pl.Series) -> pl.Series:
    """Return the address in each cell of a column of clean text, in lower case, its host in one spelling.

    '' for a blank, LEFT_OUT and the reason where there is not exactly one plausible address.
    """
    text = cells.alias("").str.to_lowercase()
    return convert_some(text, unusual_emails(text), lambda some: map_distinct(some, email_address))


def email_address(text: str) -> str:
    """Return the address in one cell; see `email_addresses`."""
    if not text:
        return ""
    addresses, is_alone = find_addresses(text)
    mailboxes = [address for address in addresses if address.local is not None]
    if len(mailboxes) > 1:
        return LEFT_OUT + LeftOut.SEVERAL
    if not is_alone or len(mailboxes) != len(addresses) or not mailboxes:
        return LEFT_OUT + LeftOut.NO_EMAIL
    ((local, host),) = mailboxes
    is_plausible = _LOCAL.fullmatch(local or "") is not None and len(local or "") <= _MAX_LOCAL_LENGTH
    address = f"{local}@{host}"
    return address if is_plausible and len(address) <= _MAX_LENGTH else LEFT_OUT + LeftOut.NO_EMAIL
