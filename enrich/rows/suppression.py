"""The suppression list of a job (`suppress`): addresses and domains that are never sent."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from enrich.errors import CommandRefused
from enrich.job.bounded_read import read_text
from enrich.rows.requests import extract_domain

#: An email address, alone in a cell or within other text.
_EMAIL_PATTERN = r"[^\s<>()\[\]\"',;:@|]+@[^\s<>()\[\]\"',;:@|/?#]+"

#: Marks around an address in a sentence, and invisible characters.
_SURROUNDING_MARKS = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]|[.!?…*_`]+$|^[*_`]+")


@dataclass(frozen=True, slots=True)
class Suppression:
    """Email addresses and domains that are never sent, in lower case and NFC."""

    addresses: frozenset[str]
    domains: frozenset[str]

    def suppressed_rows(self, frame: pl.DataFrame, param_columns: Collection[int]) -> pl.Series:
        """Return which rows have a suppressed address in any cell, or a suppressed domain in a cell that a param reads.

        A domain covers all its addresses and its subdomains. `param_columns` are indexes of columns.
        """
        suppressed = pl.repeat(value=False, n=frame.height, eager=True)
        for index, cells in enumerate(frame.iter_columns()):
            text = cells.alias("").str.normalize("NFC").str.to_lowercase()
            found = text.str.extract_all(_EMAIL_PATTERN)
            addresses = found.explode().drop_nulls().unique()
            listed = [address for address in addresses if self._contains_address(address)]
            if listed:
                suppressed |= found.list.eval(pl.element().is_in(listed)).list.any()
            if index in param_columns and self.domains:
                hosts = _extract_domains(text)
                suppressed |= hosts.is_in([host for host in hosts.unique() if self._contains_domain(host)])
        return suppressed

    def contains(self, text: str) -> bool:
        """Return whether a constant is suppressed."""
        return bool(self.suppressed_rows(pl.DataFrame({"": [text]}), [0]).any())

    def _contains_address(self, address: str) -> bool:
        address = _SURROUNDING_MARKS.sub("", address)
        return address in self.addresses or self._contains_domain(address.rpartition("@")[2])

    def _contains_domain(self, host: str) -> bool:
        parts = host.split(".")
        return any(".".join(parts[start:]) in self.domains for start in range(len(parts)))


def _extract_domains(texts: pl.Series) -> pl.Series:
    return texts.alias("").to_frame().select(extract_domain(pl.nth(0))).to_series()


#: Largest size of a list in bytes, because it is held in memory.
MAX_LIST_BYTES = 1 << 28


def read_suppression(path: Path) -> Suppression:
    """Read a list of addresses and domains, one per line; `#` begins a comment.

    Raises CommandRefused with file and line.
    """
    try:
        lines = read_text(path, MAX_LIST_BYTES).splitlines()
    except FileNotFoundError:
        raise CommandRefused(
            f"{path}: the list of `suppress` does not exist", "nobody is asked about without it"
        ) from None
    except OSError as error:
        raise CommandRefused(f"{path}: the list of `suppress` cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandRefused(f"{path}: the list of `suppress` is not UTF-8 text", "save it as UTF-8") from error
    addresses, domains = set(), set()
    entries = [unicodedata.normalize("NFC", line.partition("#")[0].strip().lower()) for line in lines]
    # `*.acme.example`, `*@acme.example`, `@acme.example` and `https://acme.example/` all mean the domain.
    hosts = _extract_domains(pl.Series("", [re.sub(r"^\*?[.@]", "", entry) for entry in entries], pl.String))
    for number, (entry, host) in enumerate(zip(entries, hosts, strict=True), 1):
        if not entry:
            continue
        is_address = re.fullmatch(_EMAIL_PATTERN, entry) is not None and not entry.startswith("*@")
        if any(map(str.isspace, entry)) or not host or ("@" in entry[2:] and not is_address):
            raise CommandRefused(f"{path}: line {number} is neither an e-mail address nor a domain", "one entry a line")
        if is_address:
            addresses.add(entry)
        else:
            domains.add(host)
    return Suppression(frozenset(addresses), frozenset(domains))
