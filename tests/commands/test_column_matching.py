"""Matches columns to params by headers in many languages and by values, and never against the values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.commands.init_columns import (
    COLUMN_KINDS,
    Column,
    ColumnMatch,
    count_matched_params,
    describe_column,
    match_columns,
    result_column_names,
    unmatched_reason,
)
from enrich.databar.description import DOCUMENTED_WATERFALLS
from tests.support.cases import in_turn

EMAIL_GETTER = ("first_name", "last_name", "company")
MAILS = ["ada@engine.example", "grace@cobol.example", "", "alan@bombe.example"]
SITES = ["https://www.engine.example/about", "http://cobol.example", "bombe.example", ""]
PROFILES = [f"https://www.linkedin.com/in/{name}" for name in ("ada", "grace", "alan")]
PHONES = ["+44 20 7946 0000", "020 7946 0771", "(613) 555-0148", ""]
NAMES = ["Ada", "Grace", "Alan"]
PARAMS = sorted({name for concept in COLUMN_KINDS for name in concept.params.split(",")} | {"budget"})


def describe_columns(**named: Sequence[str]) -> list[Column]:
    """Return the description of each column of a table."""
    return [describe_column(name.replace("_", " "), values) for name, values in named.items()]


def chosen_columns(params: Sequence[str], table: dict[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the matched columns of each param; () means no match."""
    found = match_columns(params, [describe_column(name, values) for name, values in table.items()])
    return {param: each.columns if each else () for param, each in found.items()}


@in_turn(
    ("header", "first", "last"),
    [
        (["First Name", "Last Name"], "First Name", "Last Name"),
        (["fname", "lname"], "fname", "lname"),
        (["firstName", "lastName"], "firstName", "lastName"),
        (["FIRST_NAME", "SURNAME"], "FIRST_NAME", "SURNAME"),
        (["Given Name", "Family Name"], "Given Name", "Family Name"),
        (["Vorname", "Nachname"], "Vorname", "Nachname"),
        (["Vorname", "Name"], "Vorname", "Name"),
        (["Prénom", "Nom"], "Prénom", "Nom"),
        (["Nombre", "Apellidos"], "Nombre", "Apellidos"),
        (["Nome", "Cognome"], "Nome", "Cognome"),
        (["Voornaam", "Achternaam"], "Voornaam", "Achternaam"),
        (["Imię", "Nazwisko"], "Imię", "Nazwisko"),
        (["Имя", "Фамилия"], "Имя", "Фамилия"),
        (["Contact First Name", "Contact Last Name"], "Contact First Name", "Contact Last Name"),
    ],
)
def test_header_names_in_many_languages(header: list[str], first: str, last: str) -> None:
    """Matches first and last names in the headers of common CRM exports."""
    assert chosen_columns(["first_name", "last_name"], dict.fromkeys(header, NAMES)) == {
        "first_name": (first,),
        "last_name": (last,),
    }


@in_turn("header", ["E-Mail", "email", "Email Address", "Work Email", "Courriel", "Correo electrónico"])
def test_email_by_header_and_values(header: str) -> None:
    """A match by both header and values is certain."""
    found = match_columns(["email"], [describe_column("Notes", ["x"]), describe_column(header, MAILS)])["email"]
    assert found is not None
    assert (found.columns, found.transform, found.confidence) == ((header,), ("lower",), "sure")
    assert "100% of its values are e-mail addresses" in found.reason


def test_match_by_values_is_uncertain() -> None:
    """A match by values alone is uncertain."""
    found = match_columns(
        ["email", "linkedin", "phone"], describe_columns(Field_7=MAILS, Field_8=PROFILES, Field_9=PHONES)
    )
    assert [(each.columns, each.confidence) for each in found.values() if each] == [
        (("Field 7",), "a guess"),
        (("Field 8",), "a guess"),
        (("Field 9",), "a guess"),
    ]


def test_header_contradicted_by_values() -> None:
    """Rejects a header that its values contradict: yes/no under `Email`, text under `Phone` or `mobile`."""
    assert chosen_columns(["email", "phone"], {"Email": ["yes", "no"], "Phone": ["mobile", "desk"]}) == {
        "email": (),
        "phone": (),
    }


def test_empty_columns_are_uncertain() -> None:
    """A match with an empty column is uncertain: a later export may have values."""
    found = match_columns(["email"], describe_columns(Email=["", " "]))["email"]
    assert found is not None
    assert (found.columns, found.confidence) == (("Email",), "likely")
    assert "blank" in found.reason


def test_company_from_website_then_email() -> None:
    """Matches `company` with a domain, which is the same however the website is written."""
    found = match_columns(
        EMAIL_GETTER, describe_columns(Vorname=NAMES, Nachname=NAMES, Firma=["A GmbH"], Webseite=SITES, Mail=MAILS)
    )
    company = found["company"]
    assert company is not None
    assert (company.columns, company.transform, company.confidence) == (("Webseite", "Mail"), ("domain",), "sure")


@in_turn("header", ["Firma / Website", "Website Firma", "Homepage der Firma", "Account Website", "Firma", "Account"])
def test_website_of_a_named_company(header: str) -> None:
    """A word for the company in the header of domains does not hide that they are its website."""
    found = match_columns(["company"], describe_columns(**{header: SITES, "E-Mail": [MAILS[0], "", ""]}))["company"]
    assert found is not None
    assert (found.columns[0], found.transform) == (header, ("domain",))


def test_free_mail_domains_are_ignored() -> None:
    """Ignores free-mail domains: gmail.com would stand for everyone's company."""
    private = ["ada@gmail.com", "grace@gmx.de", "alan@bombe.example"]
    assert chosen_columns(["company"], {"Email": private, "Company": ["A Ltd", "B Ltd", "C Ltd"]}) == {
        "company": ("Company",)
    }
    assert chosen_columns(["company"], {"Email": MAILS, "Company": ["A", "B", "C"]}) == {"company": ("Email",)}


def test_company_by_name_is_uncertain() -> None:
    """A match by company name is uncertain; the message: no column has the website."""
    found = match_columns(["company"], describe_columns(Account=["A Ltd", "B Ltd"]))["company"]
    assert found is not None
    assert (found.columns, found.transform, found.confidence) == (("Account",), (), "a guess")
    assert "no column has the company's website" in found.reason


def test_more_columns_only_if_they_hold_the_same() -> None:
    """`companyLocation` is no second source of a company's name, although more of its cells are filled."""
    table: dict[str, Sequence[str]] = {
        "companyName": ["Engine", "", "Bombe"],
        "Account Name": ["", "Cobol", ""],
        "companyLocation": ["London", "Paris", "Berlin"],
        "durationInCompany": ["1 year", "2 years", "3 years"],
        "Phonetic First Name": NAMES,
        "First Name": ["Ada", "", "Alan"],
    }
    assert chosen_columns(["first_name", "company"], table) == {
        "first_name": ("First Name",),
        "company": ("companyName", "Account Name"),
    }


def test_free_mail_is_that_of_the_domain_transform() -> None:
    """The addresses that `domain` leaves out are no company domains here, either; placeholders are blank."""
    (column,) = describe_columns(Email=["ada@posteo.de", "GRACE@Proton.me", "alan@bombe.example", "N/A", "\u200b"])
    assert (column.filled_count, column.free_mail_share) == (3, 2 / 3)


@in_turn(
    ("header", "values"),
    [
        ("Photo URL", [f"https://cdn.example/{n}.png" for n in range(9)]),
        ("Field 3", [f"https://cdn.example/{n}.png" for n in range(9)]),
        ("Website", PROFILES),
        ("LinkedIn", PROFILES),
    ],
)
def test_shared_hosts_are_not_company_domains(header: str, values: list[str]) -> None:
    """Ignores columns of photo and profile URLs: their domain belongs to another company."""
    assert chosen_columns(["company_website"], {header: values}) == {"company_website": ()}


def test_single_company_website() -> None:
    """Accepts a single company website under a matching header."""
    assert chosen_columns(["company"], {"Website": ["https://engine.example"] * 9}) == {"company": ("Website",)}


@in_turn("header", ["Account Owner Email", "Parent Company", "Email Opt Out", "Last Contacted", "Name"])
def test_column_about_something_else(header: str) -> None:
    """Skips a column whose header is about someone or something else."""
    assert not any(chosen_columns(["first_name", "last_name", "email", "company_name"], {header: ["x", "y"]}).values())


def test_full_names_are_reported() -> None:
    """Reports full names: no transform splits a name."""
    whole = describe_columns(Name=["Ada Lovelace", "Grace Hopper"])
    assert match_columns(["first_name"], whole) == {"first_name": None}
    assert "split it" in (unmatched_reason("first_name", whole) or "")
    assert unmatched_reason("email", whole) is None


def test_unknown_param_matches_same_name() -> None:
    """Matches an unknown param of other waterfalls to the column of the same name."""
    assert chosen_columns(["tax_number", "colour"], {"Tax Number": ["12"], "Shape": ["round"]}) == {
        "tax_number": ("Tax Number",),
        "colour": (),
    }


def test_waterfalls_ranked_by_matched_params() -> None:
    """Ranks the waterfalls by their matched params: a list of profiles fits the phone finder, not the e-mail finder."""
    profiles = describe_columns(Profile_URL=PROFILES)
    assert count_matched_params(DOCUMENTED_WATERFALLS["phone_getter"], profiles) == (1, 1)
    assert count_matched_params(DOCUMENTED_WATERFALLS["email_getter"], profiles) == (0, 3)


def test_new_column_names_are_unused() -> None:
    """Picks names for new columns that are unused in any case: `email` beside `Email` would be ambiguous."""
    assert list(result_column_names(["email", "phone", "email"], ["Email", "found_email"])) == [
        ("found_email_2", "email"),
        ("phone", "phone"),
        ("found_email_3", "email"),
    ]


TEXTS = st.text(max_size=12) | st.sampled_from([*MAILS, *SITES, *PROFILES, *PHONES, *NAMES])
HEADERS = st.text(max_size=10) | st.sampled_from(
    ["Email", "Website", "Company", "First Name", "Name", "Nom", "Phone", "LinkedIn", "Profile URL", "Domain", "URL"]
)
TABLES = st.dictionaries(HEADERS, st.lists(TEXTS, max_size=5), max_size=8)


@settings(deadline=None)
@given(TABLES, st.lists(st.sampled_from(PARAMS), unique=True, max_size=8))
def test_any_table_is_handled(table: dict[str, list[str]], params: list[str]) -> None:
    """Handles any table: never raises, is deterministic, uses existing columns, and gives none to two params.

    Except for the domain that is taken out of a column.
    """
    described = [describe_column(name, values) for name, values in table.items()]
    found = match_columns(params, described)
    assert found == match_columns(params, described)
    assert list(found) == params
    taken: list[ColumnMatch] = [each for each in found.values() if each is not None]
    assert {column for each in taken for column in each.columns} <= table.keys() - {""}
    whole = Counter(column for each in taken if each.transform != ("domain",) for column in each.columns)
    assert all(times == 1 for times in whole.values())
    for each in taken:
        assert each.reason
        assert each.columns


@settings(deadline=None)
@given(st.lists(st.text(max_size=6)), st.lists(st.text(min_size=1, max_size=6)))
def test_new_names_are_unique(header: list[str], fields: list[str]) -> None:
    """New column names clash neither with the input nor with each other."""
    names = [name.casefold() for name, _ in result_column_names(fields, header)]
    assert len(set(names)) == len(fields)
    assert not set(names) & {name.casefold() for name in header}
