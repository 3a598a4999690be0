"""Kinds of data that a column may hold, such as first names, and the headers and params that name them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from msgspec import Struct

ValueFormat = str
#: The score of a header that is exactly one of a kind of data.
EXACT_HEADER = 3
#: A single word with fewer letters is too ambiguous among other words: `Last Contacted`, `Name of the fair`.
_MIN_WORD_LENGTH = 5


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
        return 2 if any(_is_specific(name) and f" {' '.join(name)} " in whole for name in names) else 0

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
    "e mail adresse,courriel,adresse mail,adresse email,correo,correo electronico,posta elettronica,correio,почта",
    "e-mail addresses",
    ("lower",),
)
DOMAIN = ColumnKind(
    "company,company_domain,domain,company_website,website,company_url,url,organization,organisation",
    "website,web site,domain,company domain,company website,company url,account website,website firma,web,url,"
    "homepage,home page,site,site web,webseite,internetseite,internet,domaine,sitio web,pagina web,dominio,sito,"
    "sito web,webbplats,web address",
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
    """Return the kind of data that a param takes. An unknown param takes a column of its own name."""
    name = _normalized(param)
    kind = next((known for known in COLUMN_KINDS if name in map(_normalized, known.params.split(","))), None)
    return kind or ColumnKind(param, " ".join(split_words(param)) or param)


def is_usual_header(name: str) -> bool:
    """Check whether a name is exactly a header of some kind of data: `ACCOUNT.NAME`, `First Name`."""
    return any(kind.header_score(name) == EXACT_HEADER for kind in COLUMN_KINDS)
