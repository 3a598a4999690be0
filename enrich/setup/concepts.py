"""What leads are made of: how people name each thing in a header, and how its values look."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ValueFormat = str

_HOST = r"(?:[\w-]+\.)+[^\W\d_]{2,}"
#: How a value looks. A value may be of several kinds: a LinkedIn address is a URL.
VALUE_FORMATS: dict[ValueFormat, re.Pattern[str]] = {
    "e-mail addresses": re.compile(rf"(?:mailto:)?[^\s@:/]+@{_HOST}", re.IGNORECASE),
    "web addresses": re.compile(rf"[a-z][a-z0-9+.-]*://\S+|www\.{_HOST}\S*|{_HOST}(?:[/?#]\S*)", re.IGNORECASE),
    "domains": re.compile(_HOST, re.IGNORECASE),
    "LinkedIn profiles": re.compile(r"\S*linkedin\.[a-z]+/(?:in|pub|sales)/\S+", re.IGNORECASE),
    "LinkedIn company pages": re.compile(r"\S*linkedin\.[a-z]+/(?:company|school)/\S+", re.IGNORECASE),
    "phone numbers": re.compile(r"\+?[\d\s().\-/]{7,}(?:\s*(?:x|ext\.?)\s*\d+)?", re.IGNORECASE),
}
#: Mail of people, not of the company they work for.
_FREE_MAIL = re.compile(
    r"@(?:gmail|googlemail|yahoo|ymail|hotmail|outlook|live|msn|icloud|me|aol|gmx|web|mail|proton(?:mail)?|orange|free"
    r"|wanadoo|laposte|t-online|freenet|libero|qq|163|126|yandex|zoho)\.[a-z.]{2,6}$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the input as its sample shows it. `shares` of the `filled` values (a number) are of each kind.

    `top_host` is the share of the most frequent host, `free_mail` that of private mailboxes.
    """

    name: str
    filled_count: int
    format_shares: dict[ValueFormat, float]
    numeric_share: float
    spaced_share: float
    top_host_share: float
    free_mail_share: float


def describe_column(name: str, values: Iterable[str]) -> Column:
    """Look at a column's values; blank ones count for nothing."""
    filled = [value.strip() for value in values if value.strip()]
    count = len(filled) or 1
    shares = {kind: sum(1 for value in filled if form.fullmatch(value)) / count for kind, form in VALUE_FORMATS.items()}
    hosts = Counter(host for host in map(_host, filled) if host)
    return Column(
        name,
        len(filled),
        shares,
        numeric_share=sum(not any(map(str.isalpha, value)) for value in filled) / count,
        spaced_share=sum(" " in value for value in filled) / count,
        top_host_share=max(hosts.values(), default=0) / count,
        free_mail_share=sum(bool(_FREE_MAIL.search(value)) for value in filled) / count,
    )


def _host(value: str) -> str:
    return re.sub(r"^(?:[a-z][a-z0-9+.-]*://)?(?:www\.)?|[/?#:].*$", "", value.lower())


def split_words(name: str) -> tuple[str, ...]:
    """Split a header or a param into lower-case words without accents: `firstName`, `First-Name`, `Prénom`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", spaced) if not unicodedata.combining(sign))
    return tuple(re.findall(r"[^\W_]+", plain.casefold().replace("ß", "ss")))


@dataclass(frozen=True, slots=True)
class ColumnKind:
    """A thing that params ask for. `kind` is the form that its values have, None: any text."""

    params: str
    headers: str
    value_format: ValueFormat | None = None
    transform: tuple[str, ...] = ()

    def serves_param(self, param: str) -> bool:
        """Tell whether a param asks for this."""
        return _normalized(param) in map(_normalized, self.params.split(","))

    def header_score(self, header: str) -> int:
        """How well a header names this: 3 exactly, 2 among other words, 0 not at all."""
        names = [split_words(name) for name in self.headers.split(",")]
        header_words = split_words(header)
        if "".join(header_words) in {"".join(name) for name in names}:
            return 3
        if EXCLUDING_WORDS.intersection(header_words) - {word for name in names for word in name}:
            return 0
        return 2 if any(_is_specific(name) and _is_sublist(name, header_words) for name in names) else 0


#: A header with one of these speaks of somebody or something else: `Account Owner Email`, `Company Phone`.
EXCLUDING_WORDS = frozenset(
    split_words(
        "owner manager assistant referrer parent previous former old opt optin status valid verified bounced date "
        "source id type count photo image avatar logo facebook twitter instagram x blog notes note company firma "
        "account billing shipping score size industry revenue country city address street zip stage"
    )
)
#: A single word of fewer letters is too short to mean much among others: `Last Contacted`, `Name of the fair`.
_MIN_WORD_LENGTH = 5


def _normalized(name: str) -> str:
    return "".join(split_words(name))


def _is_specific(name: Sequence[str]) -> bool:
    return len(name) > 1 or (len("".join(name)) >= _MIN_WORD_LENGTH and name != ("first",))


def _is_sublist(part: Sequence[str], whole: Sequence[str]) -> bool:
    return any(tuple(whole[at : at + len(part)]) == tuple(part) for at in range(len(whole) - len(part) + 1))


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
    "e mail adresse,courriel,adresse mail,adresse email,correo,correo electronico,posta elettronica,correio,почта",
    "e-mail addresses",
    ("lower",),
)
DOMAIN = ColumnKind(
    "company,company_domain,domain,company_website,website,company_url,url,organization,organisation",
    "website,web site,domain,company domain,company website,company url,web,url,homepage,home page,site,site web,"
    "webseite,internetseite,internet,domaine,sitio web,pagina web,dominio,sito,sito web,webbplats,web address",
    "web addresses",
    ("domain",),
)
COMPANY_NAME = ColumnKind(
    "company_name,organization_name,organisation_name,account_name,employer",
    "company,company name,account,account name,organisation,organization,organisation name,organization name,"
    "employer,business,business name,firm,firma,firmenname,unternehmen,arbeitgeber,societe,entreprise,"
    "raison sociale,empresa,compania,azienda,societa,bedrijf,bedrijfsnaam,foretag,virksomhed,yritys,компания",
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
    "telefoon,телефон",
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
    """Tell what a param asks for; one that is not known asks for a column of its own name."""
    kind = next((concept for concept in COLUMN_KINDS if concept.serves_param(param)), None)
    return kind or ColumnKind(param, " ".join(split_words(param)) or param)
