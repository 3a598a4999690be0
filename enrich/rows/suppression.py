"""The suppression list of a job (`suppress`): addresses and domains that are never sent."""

from __future__ import annotations

import re
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

import polars as pl
from msgspec import Struct

from enrich.errors import CommandRefused
from enrich.job.bounded_read import read_bounded
from enrich.rows.addresses import (
    canonical_host,
    fold_address,
    fold_addresses,
    mentioned_hosts,
    parent_domains,
    read_address,
    trim_word,
    usual_hosts,
)

#: An email address, alone in a cell or within other text.
_EMAIL_PATTERN = r"[^\s<>()\[\]\"',;:@|]+@[^\s<>()\[\]\"',;:@|/?#&=+\\]+"

#: Marks around an address in a sentence.
_SURROUNDING_MARKS = re.compile(r"[.!?…*_`]+$|^[*_`]+")
#: What may be before an address in the same word: a path, a query, another address.
_BEFORE_ADDRESS = re.compile(r"^(?:.*[/?#&=\\]|\++)")


class Suppression(Struct, frozen=True):
    """Email addresses and domains that are never sent, in the spelling of `fold_address` and `canonical_host`."""

    addresses: frozenset[str]
    domains: frozenset[str]
    #: A hash of the bytes of the list (SHA-256, hex).
    digest: str = ""

    def suppressed_rows(self, frame: pl.DataFrame, param_columns: Collection[int]) -> pl.Series:
        """Return which rows have a suppressed address in any cell, or a suppressed domain in a cell that a param reads.

        A domain covers all its addresses and its subdomains. `param_columns` are indexes of columns.
        """
        suppressed = pl.repeat(value=False, n=frame.height, eager=True)
        for index, cells in enumerate(frame.iter_columns()):
            text = fold_addresses(cells)
            found = text.str.extract_all(_EMAIL_PATTERN)
            addresses = found.explode().drop_nulls().unique()
            listed = [address for address in addresses if self._contains_address(address)]
            if listed:
                suppressed |= found.list.eval(pl.element().is_in(listed)).list.any()
            if index in param_columns and self.domains:
                suppressed |= self._has_listed_host(text)
        return suppressed

    def contains(self, text: str) -> bool:
        """Return whether a constant is suppressed."""
        return bool(self.suppressed_rows(pl.DataFrame({"": [text]}), [0]).any())

    def _contains_address(self, address: str) -> bool:
        local, _, host = _SURROUNDING_MARKS.sub("", address).rpartition("@")
        host = canonical_host(host.rstrip(".")) or host
        names = (local, _BEFORE_ADDRESS.sub("", local))
        return any(f"{name}@{host}" in self.addresses for name in names) or self._contains_domain(host)

    def _contains_domain(self, host: str) -> bool:
        return any(domain in self.domains for domain in parent_domains(host))

    def _has_listed_host(self, text: pl.Series) -> pl.Series:
        host = usual_hosts(text)
        listed = [each for each in host.drop_nulls().unique() if self._contains_domain(each)]
        listed += [
            cell
            for cell in text.filter(host.is_null()).unique()
            if any(map(self._contains_domain, mentioned_hosts(cell)))
        ]
        return host.zip_with(host.is_not_null(), text).is_in(listed)


#: Largest size of a list in bytes, because it is held in memory.
MAX_LIST_BYTES = 1 << 28


def read_suppression(path: Path) -> Suppression:
    """Read a list of addresses and domains, one per line; `#` begins a comment. Raises CommandRefused."""
    try:
        content = read_bounded(path, MAX_LIST_BYTES)
        lines = content.decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise CommandRefused(
            f"{path}: the list of `suppress` does not exist", "create it, or remove `suppress` from the job file"
        ) from None
    except OSError as error:
        raise CommandRefused(f"{path}: the list of `suppress` cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandRefused(f"{path}: the list of `suppress` is not UTF-8 text", "save it as UTF-8") from error
    addresses, domains = set(), set()
    for number, line in enumerate(lines, 1):
        entry = fold_address(line.partition("#")[0])
        if not entry:
            continue
        # `*.acme.example`, `*@acme.example`, `@acme.example` and `https://acme.example/` all mean the domain.
        address = None if " " in entry else read_address(trim_word(entry))
        if address is None or "." not in address.host:
            raise CommandRefused(
                f"{path}: line {number} must be an e-mail address or a domain", "use one entry per line"
            )
        if address.local:
            addresses.add(f"{address.local}@{address.host}")
        else:
            domains.add(re.sub(r"^www\.(?=.*\.)", "", address.host))
    return Suppression(frozenset(addresses), frozenset(domains), sha256(content).hexdigest())
