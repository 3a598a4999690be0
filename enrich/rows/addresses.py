"""Finds the host or the e-mail address in a cell, and the company's domain in a host.

A host is public when the public suffix list has its ending. It is written in lower case and, where it is
international, in its ASCII form (`xn--…`), so that one host has one spelling.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import polars as pl

from enrich.job.cell_text import clean, clean_cells, convert_some, map_distinct
from enrich.models import LeftOut

#: Endings for examples and tests. The public suffix list does not have them.
EXAMPLE_SUFFIXES = ("example", "test")
#: Begins a value that is left out, before the reason (`LeftOut`). No cell that is sent has this character.
LEFT_OUT = "\0"

_ASCII_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_MAX_HOST_LENGTH = 253
#: A rule of the public suffix list. Other lines are blank, or comments.
_SUFFIX_RULE = re.compile(r"^[.*!]*\w\S*", re.MULTILINE)


class Address(NamedTuple):
    """A host as it stands, and what is before its `@`; None: nothing is."""

    local: str | None
    host: str


# Reading a cell

_BRACKETS = (r"[(\[{<]", r"[)\]}>]")
_AT = re.compile(rf"\s*{_BRACKETS[0]}\s*at\s*{_BRACKETS[1]}\s*|%40")
_DOT = re.compile(rf"\s*{_BRACKETS[0]}\s*dot\s*{_BRACKETS[1]}\s*|\u3002")
_NEEDS_FOLDING = r"[^\x00-\x7f]|[%(\[{<]"
_NEEDS_FOLDING_PATTERN = re.compile(_NEEDS_FOLDING)
#: A remark in brackets: `acme.example (old)`.
_REMARK = re.compile(r"\([^()@.]*\)|\[[^\[\]@.]*\]|\{[^{}@.]*\}")
#: The beginning of an address, repeated and broken ones too: `http://www.http://`, `htp:/`, `mailto:`.
_SCHEME = re.compile(
    r"h+t{1,3}p{1,2}s?(?:[:;]+[/\\]*|[/\\]+)|[a-z][a-z0-9+-]*:[/\\]+|:?[/\\]{2,}|mailto:|(?:www\.)+(?=h+t{1,3}p{1,2}s?[:;/\\])"
)
#: An address after a name: `Ada <ada@acme.example>`.
_BRACKETED = re.compile(r"<([^<>]*[@.][^<>]*)>")
_SEPARATORS = re.compile(r"[,;|]+")
_EDGES = "\"'`\u00b4\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a<>()[]{}*"
_END = _EDGES + ".,;:!?\u2026"
_PATH = re.compile(r"[/?#\\]")
#: One of several mailboxes without a blank between them: `ada@acme.example/bob@beta.example`.
_MAILBOX = re.compile(r"[^/?#\\&=@]+@[^/?#\\&=@+]+")


def fold_address(text: str) -> str:
    """Return the text in lower case, with `%40`, `(at)` and full-width letters as plain ones."""
    text = clean(text)
    if not text.isascii():
        text = clean(unicodedata.normalize("NFKC", text))
    text = text.lower()
    return _DOT.sub(".", _AT.sub("@", text)) if _NEEDS_FOLDING_PATTERN.search(text) else text


def fold_addresses(cells: pl.Series) -> pl.Series:
    """Fold each cell of a column of text; see `fold_address`."""
    text = clean_cells(cells).str.to_lowercase()
    # The others have nothing but the case to fold.
    return convert_some(text, text.str.contains(_NEEDS_FOLDING), lambda some: map_distinct(some, fold_address))


def find_addresses(text: str) -> tuple[list[Address], bool]:
    """Return the distinct addresses in a cell, and whether there is nothing beside them.

    `Ada <ada@acme.example>` and `acme.example (old)` have nothing beside them.
    """
    text = fold_address(text)
    bracketed = _BRACKETED.findall(text)
    found: dict[Address, Address] = {}
    is_alone = True
    for part in bracketed:
        is_alone &= _read_words(part, found)
    rest = _REMARK.sub(" ", _BRACKETED.sub(" ", text))
    is_alone &= _read_words(rest, found, names_allowed=bool(bracketed))
    return list(found.values()), is_alone


def _read_words(text: str, found: dict[Address, Address], *, names_allowed: bool = False) -> bool:
    """Add the addresses among the words to `found`, by host without `www.`. Return whether all words were read."""
    all_read = True
    for chunk in text.split():
        has_path = False
        for piece in _SEPARATORS.split(trim_word(chunk)):
            word = trim_word(piece)
            addresses = _parse(word)
            for address in addresses:
                found.setdefault(address._replace(host=address.host.removeprefix("www.")), address)
            if addresses:
                has_path = has_path or bool(_PATH.search(word))
            elif word and not has_path:  # a comma may be part of a path
                all_read &= names_allowed and "@" not in word
    return all_read


def trim_word(word: str) -> str:
    """Remove what surrounds an address: quotes, brackets, punctuation, schemes."""
    while True:
        trimmed = word.lstrip(_EDGES).rstrip(_END)
        if (scheme := _SCHEME.match(trimmed)) is not None:
            # What is before the `@` of a URL is a user of the site, or the mailbox that was made a link.
            trimmed = trimmed[scheme.end() :]
        if trimmed == word:
            return word if "@" in word else word.lstrip(".")
        word = trimmed


def _parse(word: str) -> list[Address]:
    """Read a word as an address with a public host, or as several mailboxes. In the path of a URL there are none."""
    if _MAILBOX.match(word) and len(several := _public_addresses(map(trim_word, _MAILBOX.findall(word)))) > 1:
        return several
    return _public_addresses([word])


def _public_addresses(words: Iterable[str]) -> list[Address]:
    return [address for word in words if (address := read_address(word)) is not None and is_public(address.host)]


def read_address(word: str) -> Address | None:
    """Read a word, without what surrounds it, as an address; None if it is none."""
    authority = _PATH.split(word, maxsplit=1)[0]
    before, at, host = authority.rpartition("@")
    name = canonical_host(re.sub(r":\d*$", "", host).rstrip("."))
    return None if name is None or "@" in before else Address(before if at else None, name)


def mentioned_hosts(text: str) -> Iterator[str]:
    """Yield every host in a text, public or not, alone or within an address."""
    for chunk in fold_address(text).split():
        for piece in _SEPARATORS.split(chunk):
            if (address := read_address(trim_word(piece))) is not None and "." in address.host:
                yield address.host


# Hosts


def canonical_host(host: str) -> str | None:
    """Return the one spelling of a host in lower case; None if it cannot be one."""
    labels = [_ascii_label(label) for label in host.lower().split(".")]
    known = [label for label in labels if label is not None]
    name = ".".join(known)
    # No top-level domain is a number: it is a date, an amount or an IP address.
    is_host = len(known) == len(labels) and len(name) <= _MAX_HOST_LENGTH and not known[-1].isdigit()
    return name if is_host else None


def _ascii_label(label: str) -> str | None:
    if label.isascii() and not label.startswith("xn--"):
        return label if _ASCII_LABEL.fullmatch(label) else None
    return _international_label(label)


@lru_cache(maxsize=10_000)
def _international_label(label: str) -> str | None:
    import idna  # noqa: PLC0415 - most inputs have no such host

    try:
        text = label[4:].encode("ascii").decode("punycode") if label.startswith("xn--") else label
        text = unicodedata.normalize("NFKC", text).lower()
        try:
            coded = idna.encode(text, uts46=True).decode()
        except idna.IDNAError:  # a name of the older standard, such as one with an emoji
            if not all(letter in "-_" or unicodedata.category(letter)[0] in "LMNS" for letter in text):
                return None
            coded = text if text.isascii() else f"xn--{text.encode('punycode').decode()}"
    except (UnicodeError, IndexError, OverflowError):
        return None
    return coded if _ASCII_LABEL.fullmatch(coded) else None


def is_public(host: str) -> bool:
    """Return whether a canonical host has a public suffix, and a name before it or several labels."""
    return "." in host and bool(_split_suffix(host)[1])


def registrable_domain(host: str) -> str:
    """Return the registrable domain of a public host. A host that is itself a suffix, after `www.`, is kept whole."""
    while host.startswith("www.") and "." in host[4:]:
        host = host[4:]
    name, suffix = _split_suffix(host)
    return f"{name}.{suffix}" if name else host


def _split_suffix(host: str) -> tuple[str, str]:
    """Return the label before the public suffix, and the suffix. Either may be ''."""
    name, rest = "", host
    while rest:
        label, _, parent = rest.partition(".")
        if _is_rule(f"!{rest}"):  # an exception to the rule `*.parent`
            return label, parent
        if _is_rule(rest) or _is_rule(f"*.{parent}"):
            return name, rest
        name, rest = label, parent
    return name, ""


def _is_rule(rule: str) -> bool:
    """Return whether the public suffix list has a rule, written as canonical hosts are."""
    return rule in _listed_rules() or ("xn--" in rule and rule in _international_rules())


@cache
def _international_rules() -> frozenset[str]:
    """Return the rules that are not ASCII, in their ASCII form. This takes longer than reading the list."""
    return frozenset(rule.encode("idna").decode() for rule in _listed_rules() if not rule.isascii())


@cache
def _listed_rules() -> frozenset[str]:
    """Return the rules of the public suffix list that tldextract packages, private ones included.

    The package itself is not imported: that would take ten times as long as reading the list.
    """
    package = find_spec("tldextract")
    assert package is not None and package.origin is not None  # noqa: S101, PT018 - we depend on it
    text = Path(package.origin).with_name(".tld_set_snapshot").read_text(encoding="utf-8")
    return frozenset((*_SUFFIX_RULE.findall(text), *EXAMPLE_SUFFIXES))


# Hosts of no company


@cache
def _no_company_domains() -> dict[str, LeftOut]:
    """Read the data file: host or `name.*` to the reason why it is left out."""
    data = tomllib.loads(files("enrich.rows").joinpath("no_company_domains.toml").read_text(encoding="utf-8"))
    return {name: LeftOut[kind.upper()] for kind, names in data.items() for name in names}


def no_company(host: str) -> LeftOut | None:
    """Return why a host belongs to no company of its own; None: it may belong to one."""
    known, labels = _no_company_domains(), host.split(".")
    for start in range(len(labels) - 1):
        rest = ".".join(labels[start + 1 :])
        kind = known.get(f"{labels[start]}.{rest}")
        if kind is None and (kind := known.get(f"{labels[start]}.*")) is not None and not _is_rule(rest):
            kind = None
        if kind is not None:
            return kind
    return None


# The transforms

_USUAL_HOST = r"((?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63})"
#: A percent code in a path, except `%40` (an `@`): it may belong to an address.
_USUAL_CODE = "%(?:[0-35-9a-f][0-9a-f]|4[1-9a-f])"
#: The usual cell: a host in a URL, alone, or after an `@`.
_USUAL = rf"^(?:(?:https?://)?(?:www\.)?|[a-z0-9][a-z0-9._+-]{{0,62}}@){_USUAL_HOST}\.?(?:[/?#](?:[a-z0-9._~/?#=&+-]|{_USUAL_CODE})*)?$"


def company_domains(cells: pl.Series) -> pl.Series:
    """Return the registrable domain in each clean cell: '' for a blank, LEFT_OUT and the reason where there is none."""
    text = cells.alias("").str.to_lowercase()
    # Most are registrable domains: only what is left of the hosts and cells is looked at one by one.
    found, is_unusual, is_host = pl.DataFrame({"text": text, "host": usual_hosts(text)}).select_seq(
        pl.coalesce("host", "text").alias(""), unusual=pl.col("host").is_null(), host=~_is_company_domain()
    )
    found = convert_some(found, is_host, lambda some: map_distinct(some, _domain_of_host))
    return convert_some(found, is_unusual, lambda some: map_distinct(some, _company_domain))


@cache
def _is_company_domain() -> pl.Expr:
    """Return whether `host` certainly is a company's registrable domain: two labels, and not in our list."""
    known, host = _no_company_domains(), pl.col("host")
    names = "|".join(re.escape(name.removesuffix(".*")) for name in known if name.endswith(".*"))
    is_registrable = host.str.replace(r"^[^.]+\.", "").is_in(_short_suffixes())
    return is_registrable & ~host.is_in(list(known)) & ~host.str.contains(rf"^(?:{names})\.")


@cache
def _short_suffixes() -> pl.Expr:
    """Return the public suffixes of one label."""
    return pl.lit(pl.Series([rule for rule in _listed_rules() if "." not in rule])).implode()


def usual_hosts(text: pl.Series) -> pl.Series:
    """Return the hosts in lower-case cells that have nothing unusual; null for the others."""
    cell, host = pl.col("text"), pl.col("host")
    # Takes half the time of extracting the host by the expression.
    rest = cell.str.strip_prefix("https://").str.strip_prefix("http://").str.strip_prefix("www.")
    rest = rest.str.replace(r"[/?#].*$", "").str.replace(r"^[^@]*@", "").str.strip_suffix(".")
    frame = text.alias("text").to_frame().with_columns_seq(rest.alias("host"))
    is_usual = cell.str.contains(_USUAL) & host.str.contains(r"\.") & ~host.str.contains("xn--", literal=True)
    return frame.select_seq(pl.when(is_usual).then(host).alias("")).to_series()


def hosts(cells: pl.Series) -> pl.Series:
    """Return the host in each cell of a column of clean text as it stands, with the exceptions of `company_domains`."""
    return map_distinct(cells, _company_host)


def _company_domain(text: str) -> str:
    host = _company_host(text)
    return host if host.startswith(LEFT_OUT) or not host else registrable_domain(host)


def _domain_of_host(host: str) -> str:
    host = _known_host(host) if is_public(host) else LEFT_OUT + LeftOut.NO_DOMAIN
    return host if host.startswith(LEFT_OUT) else registrable_domain(host)


def _company_host(text: str) -> str:
    if not text:
        return ""
    addresses, is_alone = find_addresses(text)
    if len(addresses) > 1:
        return LEFT_OUT + LeftOut.SEVERAL
    return _known_host(addresses[0].host) if addresses and is_alone else LEFT_OUT + LeftOut.NO_DOMAIN


def _known_host(host: str) -> str:
    """Return the host, or why it is left out."""
    kind = no_company(host)
    return host if kind is None else LEFT_OUT + kind


def parent_domains(host: str) -> Iterator[str]:
    """Yield a host and the domains above it."""
    labels = host.split(".")
    yield from (".".join(labels[start:]) for start in range(len(labels)))


# E-mail addresses

#: The usual e-mail address.
_USUAL_EMAIL = rf"^[a-z0-9_](?:[a-z0-9_+-]|\.[a-z0-9_]){{0,31}}@{_USUAL_HOST}$"
#: Longest local part and longest address (RFC 5321).
_MAX_LOCAL_LENGTH, _MAX_EMAIL_LENGTH = 64, 254
#: Words with single dots between them. Letters of any script.
_LOCAL = re.compile(r"[\w!#$%&'*+=^`{}~-]+(?:\.[\w!#$%&'*+=^`{}~-]+)*")


def email_addresses(cells: pl.Series) -> pl.Series:
    """Return the e-mail address in each cell of a column of clean text, in lower case, its host in one spelling.

    '' for a blank, LEFT_OUT and the reason where there is not exactly one plausible address. Only the API can say which
    addresses exist.
    """
    text = cells.alias("").str.to_lowercase()
    return convert_some(text, _unusual_emails(text), lambda some: map_distinct(some, email_address))


def _unusual_emails(text: pl.Series) -> pl.Series:
    """Return which lower-case cells are no e-mail address with a public host that is written as usual."""
    cell = pl.col("")
    is_usual = cell.str.contains(_USUAL_EMAIL) & cell.str.extract(r"([^.]+)$").is_in(_short_suffixes())
    return text.to_frame().select_seq(~is_usual | cell.str.contains("xn--", literal=True)).to_series()


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
    return address if is_plausible and len(address) <= _MAX_EMAIL_LENGTH else LEFT_OUT + LeftOut.NO_EMAIL
