"""Hosts, companies' domains and e-mail addresses in cells."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.resources import files

import polars as pl
import pytest
import tldextract
from hypothesis import given
from hypothesis import strategies as st

from enrich.job.cell_text import clean
from enrich.models import LeftOut
from enrich.rows.addresses import (
    EXAMPLE_SUFFIXES,
    LEFT_OUT,
    _is_rule,
    _listed_rules,
    canonical_host,
    company_domains,
    email_address,
    email_addresses,
    hosts,
    is_public,
)
from tests.support.cases import in_turn

SEVERAL, NOTHING = LeftOut.SEVERAL, LeftOut.NO_DOMAIN


def domain(cell: str) -> str:
    """Return the domain in a cell, or why there is none."""
    return str(company_domains(pl.Series("", [clean(cell)])).item()).removeprefix(LEFT_OUT)


@in_turn(
    ("cell", "expected"),
    [
        ("https://www.Example.com/about?x=1#top", "example.com"),
        ("//example.com/x", "example.com"),
        ("ftp://example.com", "example.com"),
        ("http://example.com:/x", "example.com"),
        ("https://ada:secret@example.com:443/x", "example.com"),
        ("https://example.com/@ada", "example.com"),
        ("https://example.com?mail=ada@other.example", "example.com"),
        ("mailto:ada@example.com?subject=x@y.z", "example.com"),
        ("ada.byron@mail.example.co.uk", "example.co.uk"),
        ("example.com./x", "example.com"),
        ("https://acme.com/de/0,1234,5.html", "acme.com"),
        ("http;//acme.com", "acme.com"),
        ("hhttps://https://acme.com", "acme.com"),
        ("www.www.acme.com", "acme.com"),
        ("@acme.com", "acme.com"),
        ("acme.com, www.acme.com", "acme.com"),
        ("www.de", "www.de"),
        ("www.gov.uk", "gov.uk"),
        ("lausd.k12.ca.us", "lausd.k12.ca.us"),
        ("x.a.uk.com", "a.uk.com"),
        ("acme.ai", "acme.ai"),
        ("360.cn", "360.cn"),
        ("a.b.ck", "a.b.ck"),
        ("www.ck", "www.ck"),
        ("city.kawasaki.jp", "city.kawasaki.jp"),
        ("_dmarc.example.com", "example.com"),
        ("M\u00dcNCHEN.de", "xn--mnchen-3ya.de"),
        ("mu\u0308nchen.de", "xn--mnchen-3ya.de"),
        ("XN--MNCHEN-3YA.de", "xn--mnchen-3ya.de"),
        ("m\u00fcnchen\u3002de", "xn--mnchen-3ya.de"),
        ("stra\u00dfe.de", "xn--strae-oqa.de"),
        ("\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444", "xn--e1afmkfd.xn--p1ai"),
        ("i\u2764.ws", "xn--i-7iq.ws"),
        ("xn--i-7iq.ws", "xn--i-7iq.ws"),
        ("ada@gmail.com", LeftOut.FREE_MAIL),
        ("mail.yahoo.co.uk", LeftOut.FREE_MAIL),
        ("ada@GMX.at", LeftOut.FREE_MAIL),
        ("https://de.linkedin.com/company/acme", LeftOut.SOCIAL_NETWORK),
        ("x.com/acme", LeftOut.SOCIAL_NETWORK),
        ("acme.wixsite.com/home", LeftOut.SHARED_HOST),
        ("wixsite.com", LeftOut.SHARED_HOST),
        ("acme.blogspot.de", LeftOut.SHARED_HOST),
        ("sites.google.com/view/acme", LeftOut.SHARED_HOST),
        ("google.com", "google.com"),
        ("notgmail.com", "notgmail.com"),
        ("yahoo.acme.com", "acme.com"),
        ("https://example.com\nhttps://other.example", SEVERAL),
        ("acme.com / acme.de", SEVERAL),
        ("ada@acme.com;bob@acme.com", SEVERAL),
        ("acme.com <ada@acme.de>", SEVERAL),
        ("ada@acme.com/bob@acme.de", SEVERAL),
        ("ada@acme.com/bob%40acme.de", SEVERAL),
        ("https://acme.com/contact?mail=ada@acme.de&cc=bob@acme.at", "acme.com"),
        ("https://acme.com/contact?mail=ada%40acme.de", "acme.com"),
        ("https://acme.com/a%20b", "acme.com"),
        ("acme.com/ada@acme.de/bob@acme.de", "acme.com"),
        ("see example.com", NOTHING),
        ("Acme Inc.", NOTHING),
        ("Ada <ada@acme>", NOTHING),
        ("localhost", NOTHING),
        ("apple", NOTHING),
        ("info.pdf", NOTHING),
        ("n.a.", NOTHING),
        ("12.5k", NOTHING),
        ("24.12.2026", NOTHING),
        ("192.168.0.1", NOTHING),
        ("https://[::1]/", NOTHING),
        ("http://", NOTHING),
        ("example..com", NOTHING),
        ("-acme.com", NOTHING),
        (f"{'a' * 64}.com", NOTHING),
        ("example.com:port", NOTHING),
        ("xn--zzzzzz9999999.com", NOTHING),
        ("ada@gmail.com@acme.com", NOTHING),
        ("+49 30 1234", NOTHING),
        ("", ""),
    ],
)
def test_company_domain(cell: str, expected: str) -> None:
    """A URL, an address or a host gives the registrable domain, in one spelling, or a reason."""
    assert domain(cell) == expected


@in_turn(
    ("cell", "expected"),
    [
        ("ada@a.example (old)", "ada@a.example"),
        ("Byron, Ada <Ada@A.example>", "ada@a.example"),
        ("ada@a.example <ada@a.example>", "ada@a.example"),
        ("http://ada@a.example", "ada@a.example"),
        ("\uff21da\uff20a\uff0eexample", "ada@a.example"),
        ("ada(at)a.example", "ada@a.example"),
        ("o'brien@a.example", "o'brien@a.example"),
        ("ada@www.gov.uk", "ada@www.gov.uk"),
        ("ada@xn--mnchen-3ya.example", "ada@xn--mnchen-3ya.example"),
        ("ada+news@a.example/about", "ada+news@a.example"),
        ("mailto:ada@a.example?subject=a@b", "ada@a.example"),
        ("ada@a.example/Ada@A.example", "ada@a.example"),
        ("ada@a.example bob@a.example", LeftOut.SEVERAL),
        *((f"ada+x@a.example{sign}bob@b.example", LeftOut.SEVERAL) for sign in "/?#&+|\\=,;"),
        ("ada@a.example//bob@b.example/", LeftOut.SEVERAL),
        ("mailto:ada@a.example?subject=x&cc=bob+x@b.example", LeftOut.SEVERAL),
        ("ada@a.example/'bob%40b.example'", LeftOut.SEVERAL),
        ("ada@a.example/carl/bob@b.example", LeftOut.SEVERAL),
        ("ada..b@a.example", LeftOut.NO_EMAIL),
        ("ada.@a.example", LeftOut.NO_EMAIL),
        ("ada byron@a.example", LeftOut.NO_EMAIL),
        ("a.example ada@b.example", LeftOut.NO_EMAIL),
        (f"{'a' * 65}@a.example", LeftOut.NO_EMAIL),
        ("ada@a.internal", LeftOut.NO_EMAIL),
        ("ada@[192.0.2.1]", LeftOut.NO_EMAIL),
        ("", ""),
    ],
)
def test_email_address(cell: str, expected: str) -> None:
    """A cell gives its one plausible address, or a reason."""
    assert email_address(clean(cell)).removeprefix(LEFT_OUT) == expected


LABELS = st.text(st.sampled_from("aZ09-\u00fc\u00df\u00e9\u0431\u4f8b\u0130_"), min_size=1, max_size=6)
ENDINGS = st.sampled_from(["com", "co.uk", "example", "test", "ck", "github.io", "zz", "\u0440\u0444", "de."])
HOSTS = st.builds(lambda labels, ending: ".".join([*labels, ending]), st.lists(LABELS, min_size=1, max_size=3), ENDINGS)
NAMES = st.text(st.sampled_from("aZ0.+-_'"), max_size=6)
CELLS = (
    HOSTS
    | st.builds("{}@{}".format, NAMES, HOSTS)
    | st.builds("{}{}{}".format, st.sampled_from(["http://", "https://www.", "www.", "htp:/"]), HOSTS, st.just("/x"))
    | st.text(st.sampled_from("a.@:/, <>()w%40;"), max_size=12)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
)


@given(CELLS)
def test_domain_of_a_domain_is_itself(cell: str) -> None:
    """What is sent is canonical: it is its own domain and host, and an address is its own address."""
    column = pl.Series("", [clean(cell)])
    for convert in (company_domains, hosts, email_addresses):
        (sent,) = convert(column)
        if sent and not sent.startswith(LEFT_OUT):
            assert convert(pl.Series("", [sent])).item() == sent
            assert sent.isascii() or "@" in sent


@given(
    CELLS, st.sampled_from(["{}", " {}\u200b", '"{}"', "<{}>", "{},", "{}.", "{} (old)", "\u200e{};"]), st.booleans()
)
def test_spellings_are_one_request(cell: str, pattern: str, upper: bool) -> None:  # noqa: FBT001 - Hypothesis draws it
    """Quotes, brackets, trailing dots, remarks, invisible characters and ASCII case do not matter."""
    expected = domain(cell)
    if expected in {SEVERAL, NOTHING, ""}:
        return
    spelling = "".join(letter.upper() if upper and letter.isascii() else letter for letter in cell)
    assert domain(pattern.format(spelling)) == expected


@given(HOSTS)
def test_canonical_host(host: str) -> None:
    """A canonical host stays as it is, in its Unicode form, too."""
    name = canonical_host(host.rstrip("."))
    if name is not None and is_public(name):
        assert canonical_host(name) == name == canonical_host(name.upper())


@given(st.lists(CELLS, max_size=5))
def test_columns_are_read_as_cells(cells: list[str]) -> None:
    """The result of a cell does not depend on the other cells of its column."""
    texts = [clean(cell) for cell in cells]
    column = pl.Series("", texts, pl.String)
    assert company_domains(column).to_list() == [company_domains(pl.Series("", [text])).item() for text in texts]
    assert email_addresses(column).to_list() == [email_address(text.lower()) for text in texts]


def test_listed_hosts_are_canonical() -> None:
    """Each host of the data file is public and written as it is compared, in one list only."""
    data = tomllib.loads(files("enrich.rows").joinpath("no_company_domains.toml").read_text(encoding="utf-8"))
    names = [name for kind in data.values() for name in kind]
    assert len(set(names)) == len(names)
    assert {kind.upper() for kind in data} <= set(LeftOut.__members__)
    listed = [name.replace("*", "com") for name in names]
    for host in listed:
        assert canonical_host(host) == host
        assert is_public(host)
    reasons = {LEFT_OUT + kind for kind in (LeftOut.FREE_MAIL, LeftOut.SOCIAL_NETWORK, LeftOut.SHARED_HOST)}
    assert set(company_domains(pl.Series("", [f"www.{host}" for host in listed]))) == reasons


def test_public_suffixes_are_those_of_tldextract() -> None:
    """The list is read as tldextract reads it, private suffixes included."""
    listed = tldextract.TLDExtract(
        cache_dir=None, suffix_list_urls=(), include_psl_private_domains=True, extra_suffixes=EXAMPLE_SUFFIXES
    ).tlds
    assert len(listed) > 9_000
    assert _listed_rules() == set(listed)
    assert all(_is_rule(rule if rule.isascii() else rule.encode("idna").decode()) for rule in listed)


@pytest.mark.long
def test_domains_are_found_without_importing_tldextract() -> None:
    """Its list alone is read: importing it would also import an HTTP client."""
    code = "import sys, enrich.rows.addresses as d; print(d.is_public('acme.co.uk'), 'tldextract' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "True False\n"
