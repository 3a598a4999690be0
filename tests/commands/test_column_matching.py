"""Which column serves which param: by the headers of many languages, by the values, never in contradiction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from enrich.commands.init.column_matching import (
    COLUMN_KINDS,
    Column,
    ColumnMatch,
    count_matched_params,
    describe_column,
    match_columns,
    result_column_names,
    unmatched_reason,
)
from enrich.databar.waterfall import DOCUMENTED_WATERFALLS
from tests.support.cases import in_turn

EMAIL_GETTER = ("first_name", "last_name", "company")
MAILS = ["ada@engine.example", "grace@cobol.example", "", "alan@bombe.example"]
SITES = ["https://www.engine.example/about", "http://cobol.example", "bombe.example", ""]
PROFILES = [f"https://www.linkedin.com/in/{name}" for name in ("ada", "grace", "alan")]
PHONES = ["+44 20 7946 0000", "020 7946 0771", "(613) 555-0148", ""]
NAMES = ["Ada", "Grace", "Alan"]
PARAMS = sorted({name for concept in COLUMN_KINDS for name in concept.params.split(",")} | {"budget"})


def describe_columns(**named: Sequence[str]) -> list[Column]:
    """Describe columns."""
    return [describe_column(name.replace("_", " "), values) for name, values in named.items()]


def chosen_columns(params: Sequence[str], table: dict[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Which columns are taken; none: ()."""
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
    """As exports of CRMs write them."""
    assert chosen_columns(["first_name", "last_name"], dict.fromkeys(header, NAMES)) == {
        "first_name": (first,),
        "last_name": (last,),
    }


@in_turn("header", ["E-Mail", "email", "Email Address", "Work Email", "Courriel", "Correo electrónico"])
def test_email_by_header_and_values(header: str) -> None:
    """Both together are sure."""
    found = match_columns(["email"], [describe_column("Notes", ["x"]), describe_column(header, MAILS)])["email"]
    assert found is not None
    assert (found.columns, found.transform, found.confidence) == ((header,), ("lower",), "sure")
    assert "100% of its values are e-mail addresses" in found.reason


def test_match_by_values_is_uncertain() -> None:
    """A column of another name that holds nothing but what is asked for."""
    found = match_columns(
        ["email", "linkedin", "phone"], describe_columns(Field_7=MAILS, Field_8=PROFILES, Field_9=PHONES)
    )
    assert [(each.columns, each.confidence) for each in found.values() if each] == [
        (("Field 7",), "a guess"),
        (("Field 8",), "a guess"),
        (("Field 9",), "a guess"),
    ]


def test_header_contradicted_by_values() -> None:
    """`Email` that says yes or no is no address; `Phone` of `mobile` is no number."""
    assert chosen_columns(["email", "phone"], {"Email": ["yes", "no"], "Phone": ["mobile", "desk"]}) == {
        "email": (),
        "phone": (),
    }


def test_empty_columns_are_uncertain() -> None:
    """Tonight's export may have values where the sample had none."""
    found = match_columns(["email"], describe_columns(Email=["", " "]))["email"]
    assert found is not None
    assert (found.columns, found.confidence) == (("Email",), "likely")
    assert "blank" in found.reason


def test_company_from_website_then_email() -> None:
    """`company` is asked with a domain, which is the same for all that write it differently."""
    found = match_columns(
        EMAIL_GETTER, describe_columns(Vorname=NAMES, Nachname=NAMES, Firma=["A GmbH"], Webseite=SITES, Mail=MAILS)
    )
    company = found["company"]
    assert company is not None
    assert (company.columns, company.transform, company.confidence) == (("Webseite", "Mail"), ("domain",), "sure")


def test_free_mail_domains_are_ignored() -> None:
    """The domain of gmail.com would be asked for everybody."""
    private = ["ada@gmail.com", "grace@gmx.de", "alan@bombe.example"]
    assert chosen_columns(["company"], {"Email": private, "Company": ["A Ltd", "B Ltd", "C Ltd"]}) == {
        "company": ("Company",)
    }
    assert chosen_columns(["company"], {"Email": MAILS, "Company": ["A", "B", "C"]}) == {"company": ("Email",)}


def test_company_by_name_is_uncertain() -> None:
    """It is said that no column holds the website."""
    found = match_columns(["company"], describe_columns(Account=["A Ltd", "B Ltd"]))["company"]
    assert found is not None
    assert (found.columns, found.transform, found.confidence) == (("Account",), (), "a guess")
    assert "no column holds the company's website" in found.reason


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
    """Photos and profiles lie on the domain of somebody else."""
    assert chosen_columns(["company_website"], {header: values}) == {"company_website": ()}


def test_single_company_website() -> None:
    """A header that says so is believed."""
    assert chosen_columns(["company"], {"Website": ["https://engine.example"] * 9}) == {"company": ("Website",)}


@in_turn("header", ["Account Owner Email", "Parent Company", "Email Opt Out", "Last Contacted", "Name"])
def test_column_about_something_else(header: str) -> None:
    """A word of the header says that it is about somebody or something else."""
    assert not any(chosen_columns(["first_name", "last_name", "email", "company_name"], {header: ["x", "y"]}).values())


def test_full_names_are_reported() -> None:
    """No transform splits a name."""
    whole = describe_columns(Name=["Ada Lovelace", "Grace Hopper"])
    assert match_columns(["first_name"], whole) == {"first_name": None}
    assert "split it" in (unmatched_reason("first_name", whole) or "")
    assert unmatched_reason("email", whole) is None


def test_unknown_param_matches_same_name() -> None:
    """Other waterfalls have other params."""
    assert chosen_columns(["tax_number", "colour"], {"Tax Number": ["12"], "Shape": ["round"]}) == {
        "tax_number": ("Tax Number",),
        "colour": (),
    }


def test_waterfalls_ranked_by_matched_params() -> None:
    """A list of profiles fits the phone finder and not the e-mail finder."""
    profiles = describe_columns(Profile_URL=PROFILES)
    assert count_matched_params(DOCUMENTED_WATERFALLS["phone_getter"], profiles) == (1, 1)
    assert count_matched_params(DOCUMENTED_WATERFALLS["email_getter"], profiles) == (0, 3)


def test_new_column_names_are_unused() -> None:
    """Whatever the case: `email` beside `Email` would be taken for the other."""
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
    """It never raises, is the same each time, names columns that are there, and gives none to two params.

    But for the domain that is taken out of a column.
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
    """Neither with the input's nor with each other."""
    names = [name.casefold() for name, _ in result_column_names(fields, header)]
    assert len(set(names)) == len(fields)
    assert not set(names) & {name.casefold() for name in header}
