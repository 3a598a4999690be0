"""Matches the columns of an input to the params of a waterfall, by their headers and values."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

from msgspec import Struct

from enrich.databar.description import Description
from enrich.job.cell_text import EMPTY_VALUES, PLACEHOLDERS, clean
from enrich.models import LeftOut
from enrich.rows.addresses import no_company

ValueFormat = str
#: The score of a header that is exactly one of a kind of data, and of one that has it among other words.
EXACT_HEADER, INEXACT_HEADER = 3, 2
#: A single word with fewer letters is too ambiguous among other words: `Last Contacted`, `Name of the fair`.
_MIN_WORD_LENGTH = 5


# Each header is compared with each kind of data for each param.
@lru_cache(maxsize=1 << 16)
def split_words(name: str) -> tuple[str, ...]:
    """Split a header or param name (`firstName`, `First-Name`, `Prénom`) into lower-case words without accents."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", spaced) if not unicodedata.combining(sign))
    return tuple(re.findall(r"[^\W_]+", plain.casefold().replace("ß", "ss")))


class ColumnKind(Struct, frozen=True):
    """A kind of data: names of params that take it and of headers (comma-separated). No `value_format`: any text."""

    params: str
    headers: str
    value_format: ValueFormat | None = None
    transform: tuple[str, ...] = ()

    def header_score(self, header: str) -> int:
        """Return how well a header matches: 3 exactly, 2 among other words, 0 not at all."""
        names = [split_words(name) for name in self.headers.split(",")]
        header_words = split_words(header)
        if "".join(header_words) in {"".join(name) for name in names}:
            return EXACT_HEADER
        if self.is_excluded(header):
            return 0
        whole = f" {' '.join(header_words)} "
        return INEXACT_HEADER if any(_is_specific(name) and f" {' '.join(name)} " in whole for name in names) else 0

    def is_excluded(self, header: str) -> bool:
        """Whether a header has an excluding word that no header of this kind has."""
        own_words = {word for name in self.headers.split(",") for word in split_words(name)}
        return not EXCLUDING_WORDS.intersection(split_words(header)) <= own_words


#: A header with one of these words names another person or thing: `Account Owner Email`, `Company Phone`.
EXCLUDING_WORDS = frozenset(
    split_words(
        "owner manager assistant referrer parent previous former old opt optin status valid verified bounced date "
        "source id type count photo image avatar logo facebook twitter instagram x blog notes note company firma "
        "account billing shipping score size industry revenue country city address street zip stage"
    )
)


def _normalized(name: str) -> str:
    return "".join(split_words(name))


def _is_specific(name: Sequence[str]) -> bool:
    return len(name) > 1 or (len("".join(name)) >= _MIN_WORD_LENGTH and name != ("first",))


FIRST_NAME = ColumnKind(
    "first_name,firstname,given_name,fname",
    "first name,firstname,fname,given name,forename,first,vorname,prenom,nombre,nome,voornaam,imie,fornamn,fornavn,"
    "etunimi,nome proprio,primer nombre,имя,名",
)
LAST_NAME = ColumnKind(
    "last_name,lastname,surname,family_name,lname",
    "last name,lastname,lname,surname,family name,last,nachname,familienname,zuname,nom,nom de famille,apellido,"
    "apellidos,cognome,sobrenome,apelido,achternaam,nazwisko,efternamn,etternavn,sukunimi,фамилия,姓",
)
FULL_NAME = ColumnKind(
    "full_name,name,person_name,contact_name",
    "full name,name,contact name,contact,person,lead name,lead,nom complet,nombre completo,nome completo,"
    "ansprechpartner,kontakt,naam,imie i nazwisko",
)
EMAIL = ColumnKind(
    "email,work_email,email_address,business_email",
    "email,e mail,mail,email address,e mail address,work email,business email,mailadresse,emailadresse,"
    "e mail adresse,courriel,adresse mail,adresse email,correo,correo electronico,posta elettronica,correio,почта,"
    "メールアドレス,メール",
    "e-mail addresses",
    ("lower",),
)
DOMAIN = ColumnKind(
    "company,company_domain,domain,company_website,website,company_url,url,organization,organisation",
    "website,web site,domain,company domain,company website,company url,account website,website firma,web,url,"
    "homepage,home page,site,site web,webseite,internetseite,internet,domaine,sitio web,pagina web,dominio,sito,"
    "sito web,webbplats,web address,web page,ウェブサイト,ホームページ",
    "web addresses",
    ("domain",),
)
COMPANY_NAME = ColumnKind(
    "company_name,organization_name,organisation_name,account_name,employer",
    "company,company name,account,account name,organisation,organization,organisation name,organization name,"
    "employer,business,business name,firm,firma,firmenname,unternehmen,arbeitgeber,societe,entreprise,"
    "raison sociale,empresa,compania,azienda,societa,bedrijf,bedrijfsnaam,foretag,virksomhed,yritys,компания,"
    "会社名,会社,企業名",
)
LINKEDIN = ColumnKind(
    "linkedin,linkedin_url,link,profile_url,linkedin_profile,person_linkedin,person_linkedin_url,profile,profile_link",
    "linkedin,linked in,linkedin url,linkedin profile,linkedin profile url,linkedin link,person linkedin url,"
    "profile url,profil linkedin,li url",
    "LinkedIn profiles",
)
COMPANY_LINKEDIN = ColumnKind(
    "company_linkedin,company_linkedin_url,linkedin_company",
    "company linkedin,company linkedin url,linkedin company,linkedin company url,account linkedin",
    "LinkedIn company pages",
)
PHONE = ColumnKind(
    "phone,phone_number,mobile,mobile_phone,telephone",
    "phone,phone number,mobile,mobile phone,mobile number,cell,cell phone,tel,telephone,telefon,telefonnummer,handy,"
    "mobil,mobilnummer,mobiltelefon,telephone portable,portable,telefono,movil,celular,telefone,cellulare,"
    "telefoon,телефон,電話番号,電話",
    "phone numbers",
)
COUNTRY = ColumnKind("country,country_code", "country,country code,land,pays,pais,paese,kraj,страна")
CITY = ColumnKind("city,town", "city,town,stadt,ort,ville,ciudad,citta,cidade,stad,miasto,город")
TITLE = ColumnKind(
    "title,job_title,position,role",
    "title,job title,position,role,function,berufsbezeichnung,funktion,poste,fonction,cargo,puesto,ruolo,functie",
)
COLUMN_KINDS = (
    FIRST_NAME, LAST_NAME, FULL_NAME, EMAIL, DOMAIN, COMPANY_NAME, LINKEDIN, COMPANY_LINKEDIN, PHONE, COUNTRY,
    CITY, TITLE,
)  # fmt: skip


def column_kind_of(param: str) -> ColumnKind:
    """Return the kind of data that a param takes. An unknown param takes a column of its own name."""
    name = _normalized(param)
    kind = next((known for known in COLUMN_KINDS if name in map(_normalized, known.params.split(","))), None)
    return kind or ColumnKind(param, " ".join(split_words(param)) or param)


def is_usual_header(name: str) -> bool:
    """Check whether a name is exactly a header of some kind of data: `ACCOUNT.NAME`, `First Name`."""
    return any(kind.header_score(name) == EXACT_HEADER for kind in COLUMN_KINDS)


Confidence = Literal["sure", "likely", "a guess"]
_HOST = r"(?:[\w-]+\.)+[^\W\d_]{2,}"
#: Patterns of value formats. A value may have several formats: a LinkedIn address is also a URL.
VALUE_FORMATS: dict[ValueFormat, re.Pattern[str]] = {
    "e-mail addresses": re.compile(rf"(?:mailto:)?[^\s@:/]+@{_HOST}", re.IGNORECASE),
    "web addresses": re.compile(rf"[a-z][a-z0-9+.-]*://\S+|www\.{_HOST}\S*|{_HOST}(?:[/?#]\S*)", re.IGNORECASE),
    "domains": re.compile(_HOST, re.IGNORECASE),
    "LinkedIn profiles": re.compile(r"\S*linkedin\.[a-z]+/(?:in|pub|sales)/\S+", re.IGNORECASE),
    "LinkedIn company pages": re.compile(r"\S*linkedin\.[a-z]+/(?:company|school)/\S+", re.IGNORECASE),
    "phone numbers": re.compile(r"\+?[\d\s().\-/]{7,}(?:\s*(?:x|ext\.?)\s*\d+)?", re.IGNORECASE),
}
_AROUND_HOST = re.compile(r"^(?:[a-z][a-z0-9+.-]*://)?(?:www\.)?|[/?#:].*$")
#: Shares of the values in a format: from the first on it is proven, below the second it is ruled out, and from the
#: third on the few other values count as exceptions.
PROVING_SHARE, CONTRADICTING_SHARE, DOMINANT_SHARE = 0.5, 0.1, 0.8
#: With this share of private mailboxes or more, a column of addresses yields no company domains.
MAX_FREE_MAIL_SHARE = 0.2
#: Minimum number of values for judging how often a host occurs.
MIN_VALUES = 4


class Column(Struct, frozen=True):
    """Statistics of the sampled values of an input column. All shares (0 to 1) refer to the non-blank values.

    `filled_count` is the number of non-blank values. `numeric_share` counts values without letters, `spaced_share`
    values with a space, `top_host_share` the most frequent host, `free_mail_share` private mailboxes.
    """

    name: str
    filled_count: int
    format_shares: dict[ValueFormat, float]
    numeric_share: float
    spaced_share: float
    top_host_share: float
    free_mail_share: float


def describe_column(name: str, values: Iterable[str]) -> Column:
    """Compute the statistics of a column's values. Blank values are ignored."""
    filled = [text for text in map(clean, values) if text and text not in (*PLACEHOLDERS, *EMPTY_VALUES)]
    count = len(filled) or 1
    shares = {kind: sum(1 for value in filled if form.fullmatch(value)) / count for kind, form in VALUE_FORMATS.items()}
    hosts = Counter(host for value in filled if (host := _AROUND_HOST.sub("", value.lower())))
    domains = [domain for _, at, domain in (value.lower().rpartition("@") for value in filled) if at]
    return Column(
        name,
        len(filled),
        shares,
        numeric_share=sum(not any(map(str.isalpha, value)) for value in filled) / count,
        spaced_share=sum(" " in value for value in filled) / count,
        top_host_share=max(hosts.values(), default=0) / count,
        free_mail_share=sum(no_company(domain) is LeftOut.FREE_MAIL for domain in domains) / count,
    )


class ColumnMatch(Struct, frozen=True):
    """The columns and transforms that supply a param's values. `filled` counts the sampled cells of each column."""

    columns: tuple[str, ...]
    transform: tuple[str, ...]
    confidence: Confidence
    reason: str
    filled: tuple[int, ...]


class _Candidate(Struct, frozen=True):
    """How well a column fits a kind of data."""

    column: Column
    score: int
    confidence: Confidence
    reason: str

    @property
    def is_plain(self) -> bool:
        """Whether there are values, and the header fits exactly, or both the header and most values do."""
        return self.score > INEXACT_HEADER * 10 and self.column.filled_count > 0


def match_columns(params: Sequence[str], columns: Sequence[Column]) -> dict[str, ColumnMatch | None]:
    """Choose columns for the params, those first that fill the most rows; None where no column fits.

    Each column supplies one param only, but the company domain may also come from a column of another param. Equal
    input gives equal results.
    """
    matches: dict[str, ColumnMatch | None] = dict.fromkeys(params)
    kinds = {param: column_kind_of(param) for param in params}
    for param, kind in kinds.items():
        if kind is DOMAIN:
            matches[param] = _match_domain(columns)
    open_kinds = {
        param: COMPANY_NAME if kind is DOMAIN else kind for param, kind in kinds.items() if matches[param] is None
    }
    candidates = [(param, fit) for param, kind in open_kinds.items() for fit in _ranked_candidates(kind, columns)]
    candidates.sort(key=lambda each: -each[1].score)
    used_columns: set[str] = set()
    fits: dict[str, list[_Candidate]] = {}
    for param, fit in candidates:
        if param not in fits and fit.column.name not in used_columns:
            used_columns.add(fit.column.name)
            fits[param] = [fit]
    # A column that is left over supplies a param, too, if its header fits.
    for param, fit in candidates:
        if param in fits and fit.column.name not in used_columns and fit.is_plain:
            used_columns.add(fit.column.name)
            fits[param].append(fit)
    for param, columns_of_param in fits.items():
        by_name = kinds[param] is DOMAIN
        more = "no column has the company's website" if by_name else None
        confidence: Confidence = "a guess" if by_name else columns_of_param[0].confidence
        matches[param] = _make_match(columns_of_param, open_kinds[param].transform, confidence, more)
    return matches


def _make_match(
    fits: Sequence[_Candidate], transform: tuple[str, ...], confidence: Confidence, more: str | None = None
) -> ColumnMatch:
    """Make a match of several columns, those first that fill the most rows, private mailboxes not counted."""
    ordered = sorted(fits, key=lambda fit: -round(fit.column.filled_count * (1 - fit.column.free_mail_share)))
    reasons = [fit.reason if len(ordered) == 1 else f"{fit.column.name!r}: {fit.reason}" for fit in ordered]
    return ColumnMatch(
        tuple(fit.column.name for fit in ordered),
        transform,
        confidence,
        "; ".join([*reasons, *([more] if more else [])]),
        tuple(fit.column.filled_count for fit in ordered),
    )


def _match_domain(columns: Sequence[Column]) -> ColumnMatch | None:
    """Match the company domain to website columns and to the email addresses of employees. None if none fits."""
    sites = _ranked_candidates(DOMAIN, columns)
    mails = [
        fit
        for fit in _ranked_candidates(EMAIL, columns)
        if fit.column.filled_count and fit.column.free_mail_share < MAX_FREE_MAIL_SHARE
    ]
    fits = [fits[0] for fits in (sites, mails) if fits]
    fits += [fit for fit in (*sites[1:], *mails[1:]) if fit.is_plain]
    if not fits:
        return None
    fit_of_column: dict[str, _Candidate] = {}
    for fit in fits:
        fit_of_column.setdefault(fit.column.name, fit)
    confidence = sites[0].confidence if sites else "a guess"
    return _make_match(list(fit_of_column.values()), DOMAIN.transform, confidence)


def _ranked_candidates(kind: ColumnKind, columns: Sequence[Column]) -> list[_Candidate]:
    candidates = [fit for column in columns if column.name and (fit := _make_candidate(kind, column, columns))]
    return sorted(candidates, key=lambda fit: -fit.score)


def _make_candidate(kind: ColumnKind, column: Column, columns: Sequence[Column]) -> _Candidate | None:
    header_score = kind.header_score(column.name) or _german_last_name_score(kind, column, columns)
    if kind is FULL_NAME and header_score != EXACT_HEADER:
        return None
    if kind.value_format is None:
        if not header_score or _is_not_a_name(kind, column):
            return None
        confidence: Confidence = "sure" if header_score == EXACT_HEADER and column.filled_count else "likely"
        return _Candidate(column, header_score * 10, confidence, _blank_reason(column) or "by its header")
    share = column.format_shares[kind.value_format]
    if kind is DOMAIN:
        share = min(1.0, share + column.format_shares["domains"])
    if column.filled_count and share < CONTRADICTING_SHARE:
        return None
    if not header_score and (share < DOMINANT_SHARE or kind.is_excluded(column.name)):
        return None
    if kind is DOMAIN:
        linkedin_share = column.format_shares["LinkedIn profiles"] + column.format_shares["LinkedIn company pages"]
        # Most photo URLs, for example, lead to one site.
        is_single_site = column.filled_count >= MIN_VALUES and column.top_host_share > DOMINANT_SHARE
        if linkedin_share >= PROVING_SHARE or (not header_score and is_single_site):
            return None
    proven = share >= PROVING_SHARE
    share_text = f"{share:.0%} of its values are {kind.value_format}"
    if not header_score:
        return _Candidate(column, 5, "a guess", f"{share_text}; not by its header")
    confidence = "sure" if header_score == EXACT_HEADER and proven else "likely"
    return _Candidate(
        column, header_score * 10 + proven * 5, confidence, _blank_reason(column) or f"by its header; {share_text}"
    )


def _blank_reason(column: Column) -> str | None:
    return None if column.filled_count else "by its header; all values that were looked at are blank"


def _is_not_a_name(kind: ColumnKind, column: Column) -> bool:
    """Whether a column holds addresses or numbers although the kind is a name."""
    if kind not in (FIRST_NAME, LAST_NAME, FULL_NAME, COMPANY_NAME):
        return False
    return (
        max(column.format_shares["e-mail addresses"], column.format_shares["web addresses"]) >= PROVING_SHARE
        or column.numeric_share >= PROVING_SHARE
    )


def _german_last_name_score(kind: ColumnKind, column: Column, columns: Sequence[Column]) -> int:
    """Return 1 if `Name` means the last name: there is a first-name column and no other last-name column."""
    if kind is not LAST_NAME or FULL_NAME.header_score(column.name) != EXACT_HEADER or column.name.casefold() != "name":
        return 0
    names = [other.name for other in columns]
    has_first_name = any(FIRST_NAME.header_score(name) == EXACT_HEADER for name in names) and not any(
        map(LAST_NAME.header_score, names)
    )
    return 1 if has_first_name and column.spaced_share < PROVING_SHARE else 0


def unmatched_reason(param: str, columns: Sequence[Column]) -> str | None:
    """Return why no column fits a param. None if there is no known reason."""
    if column_kind_of(param) in (FIRST_NAME, LAST_NAME):
        whole = _ranked_candidates(FULL_NAME, columns)[:1]
        if whole and whole[0].column.spaced_share >= PROVING_SHARE:
            return f"{whole[0].column.name!r} seems to have whole names: split it into two columns"
    return None


def existing_result_columns(fields: Iterable[str], columns: Sequence[Column]) -> list[str]:
    """Return the columns that already hold fields of the result."""
    kinds = [column_kind_of(field) for field in fields]
    return [candidates[0].column.name for kind in kinds if (candidates := _ranked_candidates(kind, columns))]


def count_matched_params(described: Description, columns: Sequence[Column]) -> tuple[int, int]:
    """Return how many required params have a matching column, and how many it has."""
    required = [param.name for param in described.input_params if param.required]
    matches = match_columns(required, columns)
    return sum(each is not None for each in matches.values()), len(required)


def result_column_names(fields: Sequence[str], header: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (new column, field). The new names do not occur in the header, ignoring case."""
    used_names = {name.casefold() for name in header}
    for field in fields:
        names = (field, f"found_{field}", *(f"found_{field}_{number}" for number in range(2, len(used_names) + 3)))
        name = next(name for name in names if name.casefold() not in used_names)
        used_names.add(name.casefold())
        yield name, field
