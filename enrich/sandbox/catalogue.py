"""What the sandbox offers, with invented sources and prices: waterfalls, enrichments, and flows, which never run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

#: Most pages of one run of an enrichment.
MAX_PAGES = 100
_MILLION = 1_000_000


def to_micros(amount: Decimal | float | str) -> int:
    """Convert credits, as the API or a user writes them, to whole millionths, so that sums are exact."""
    return int((Decimal(str(amount)) * _MILLION).to_integral_value())


def to_credits(micros: float) -> float:
    """Convert millionths to credits as a JSON number."""
    return micros / _MILLION


@dataclass(frozen=True)
class Service:
    """What a waterfall calls. `price` is a number or a string: the API uses both."""

    id: int
    name: str
    price: float | str

    @cached_property
    def cost(self) -> int:
        """The price in millionths of a credit."""
        return to_micros(self.price)


@dataclass(frozen=True)
class Provider(Service):
    """A data provider of a waterfall."""

    coverage: float
    params: tuple[str, ...]
    enabled: bool = True


class Verifier(Service):
    """A service that checks whether a mailbox exists."""


@dataclass(frozen=True, slots=True)
class Waterfall:
    """A kind of lookup for which several providers are called in turn."""

    identifier: str
    name: str
    description: str
    required: tuple[str, ...]
    outputs: Mapping[str, str]
    providers: tuple[Provider, ...]
    optional: tuple[str, ...] = ()
    verifiers: tuple[Verifier, ...] = ()

    def default_providers(self) -> list[int]:
        """Return the ids of the providers that are called when a request names none."""
        return [provider.id for provider in self.providers if provider.enabled]

    def with_prices(self, prices: Mapping[int, float]) -> "Waterfall":
        """Return the waterfall with other prices, by the ids of providers and verifiers."""
        if not prices:
            return self
        return replace(
            self,
            providers=tuple(replace(one, price=prices.get(one.id, one.price)) for one in self.providers),
            verifiers=tuple(replace(one, price=str(prices.get(one.id, one.price))) for one in self.verifiers),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the body of `GET /v1/waterfalls/{id}`."""
        inputs = [*((name, True) for name in self.required), *((name, False) for name in self.optional)]
        return {
            "identifier": self.identifier,
            "name": self.name,
            "description": self.description,
            "input_params": [{"name": name, "type": "text", "required": needed} for name, needed in inputs],
            "output_fields": [
                {"name": name, "label": name.replace("_", " ").capitalize(), "type": kind}
                for name, kind in self.outputs.items()
            ],
            "available_enrichments": [
                {
                    "id": provider.id,
                    "name": provider.name,
                    "description": f"{self.name} with {provider.name}",
                    "price": provider.price,
                    "params": list(provider.params),
                    "enabled_by_default": provider.enabled,
                }
                for provider in self.providers
            ],
            "is_email_verifying": bool(self.verifiers),
            "email_verifiers": [
                {"id": verifier.id, "name": verifier.name, "description": "Checks the mailbox", "price": verifier.price}
                for verifier in self.verifiers
            ],
        }


@dataclass(frozen=True, slots=True)
class EnrichmentParam:
    """A param of an enrichment. `choices` are the only values allowed; empty: any."""

    name: str
    description: str
    required: bool = True
    choices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the param as the API describes it."""
        described = {
            "name": self.name,
            "is_required": self.required,
            "type_field": "select" if self.choices else "text",
            "description": self.description,
        }
        if self.choices:
            described["choices"] = {"mode": "inline", "items": [{"id": one, "name": one} for one in self.choices]}
        return described


@dataclass(frozen=True)
class Enrichment:
    """One source, outside of a waterfall.

    `priced_by` is the param that the price is multiplied by. `per_page` is the number of rows on a page; None: its
    result is one row.
    """

    id: int
    name: str
    description: str
    data_source: str
    price: float
    inputs: tuple[EnrichmentParam, ...]
    outputs: Mapping[str, str]
    category: str
    priced_by: str | None = None
    per_page: int | None = None
    always_answers: bool = False

    @cached_property
    def cost(self) -> int:
        """The price in millionths of a credit."""
        return to_micros(self.price)

    @property
    def required(self) -> tuple[str, ...]:
        """The names of the required params."""
        return tuple(param.name for param in self.inputs if param.required)

    @property
    def optional(self) -> tuple[str, ...]:
        """The names of the other params."""
        return tuple(param.name for param in self.inputs if not param.required)

    def choices(self, param_name: str) -> tuple[str, ...]:
        """Return the only values of a param that are allowed; empty: any."""
        return next((param.choices for param in self.inputs if param.name == param_name), ())

    def with_prices(self, prices: Mapping[int, float]) -> "Enrichment":
        """Return the enrichment with the price under its id."""
        return replace(self, price=prices[self.id]) if self.id in prices else self

    def summary(self) -> dict[str, Any]:
        """Return the enrichment as `GET /v1/enrichments/` lists it."""
        pricing = {"type": "per_parameter", "parameter": self.priced_by} if self.priced_by else {"type": "fixed"}
        return {
            "id": self.id,
            "name": self.name,
            "description": self.description,
            "data_source": self.data_source,
            "price": self.price,
            "auth_method": "none",
            "pricing": pricing,
            "category": [{"id": CATEGORIES.index(self.category) + 1, "name": self.category}],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the body of `GET /v1/enrichments/{id}`."""
        pages = {"supported": False} if self.per_page is None else {"supported": True, "per_page": self.per_page}
        return self.summary() | {
            "params": [param.to_json() for param in self.inputs],
            "response_fields": [
                {"name": name, "display_name": name.replace("_", " ").capitalize(), "type_field": kind}
                for name, kind in self.outputs.items()
            ],
            "pagination": pages,
        }


_NAME = ("first_name", "last_name", "company")

WATERFALLS: Mapping[str, Waterfall] = {
    waterfall.identifier: waterfall
    for waterfall in (
        Waterfall(
            "email_getter",
            "Email finder",
            "Finds a person's work email by name and company.",
            required=_NAME,
            optional=("linkedin",),
            outputs={"email": "text"},
            providers=(
                Provider(833, "Mailhound", 0.5, 0.55, _NAME),
                Provider(966, "Peoplegrid", 1.0, 0.5, _NAME),
                Provider(701, "Inboxly", 0.01, 0.25, _NAME),
                Provider(745, "Profilewell", 2.0, 0.6, (*_NAME, "linkedin")),
                Provider(113, "Apex Contacts", 2.0, 0.65, _NAME, enabled=False),
            ),
            verifiers=(Verifier(10, "Mailproof", "0.01"), Verifier(12, "Bouncewatch", "0.05")),
        ),
        Waterfall(
            "person_getter",
            "Person finder",
            "Finds who a work email belongs to.",
            required=("email",),
            outputs={"first_name": "text", "last_name": "text", "linkedin_url": "url"},
            providers=(
                Provider(833, "Mailhound", "0.5", 0.5, ("email",)),
                Provider(912, "Whobase", "1.0", 0.5, ("email",)),
                Provider(920, "Deepcontact", "2.0", 0.6, ("email",), enabled=False),
            ),
        ),
        Waterfall(
            "phone_getter",
            "Phone finder",
            "Finds a mobile phone number by profile.",
            required=("linkedin",),
            outputs={"phone": "phone"},
            providers=(
                Provider(510, "Dialdesk", 2.0, 0.4, ("linkedin",)),
                Provider(522, "Ringbook", 3.5, 0.4, ("linkedin",)),
                Provider(530, "Callgraph", 5.0, 0.5, ("linkedin",)),
                Provider(541, "Directline", 10.0, 0.6, ("linkedin",), enabled=False),
            ),
        ),
        Waterfall(
            "company_lookup",
            "Company lookup",
            "Describes the company behind a website.",
            required=("company_website",),
            outputs={
                "name": "text",
                "description": "text",
                "linkedin": "url",
                "employees": "number",
                "industries": "json",
                "revenue": "number",
                "funding": "json",
            },
            providers=(
                Provider(301, "Firmfacts", "0.01", 0.5, ("company_website",)),
                Provider(317, "Orgsight.example", "0.5", 0.6, ("company_website",)),
                Provider(329, "Registrar Pro", "1.0", 0.4, ("company_website",)),
                Provider(1304, "Blendrank", "2.0", 0.7, ("company_website",), enabled=False),
            ),
        ),
        Waterfall(
            "person_by_link",
            "Email by link",
            "Finds the emails of the person behind a profile link.",
            required=("link",),
            outputs={"first_name": "text", "last_name": "text", "work_email": "text", "personal_email": "text"},
            providers=(
                Provider(610, "Profilewell", 0.5, 0.6, ("link",)),
                Provider(622, "Peoplegrid", 1.0, 0.5, ("link",)),
                Provider(640, "Deepcontact", 2.0, 0.5, ("link",), enabled=False),
            ),
        ),
        Waterfall(
            "job_postings_getter",
            "Job postings",
            "Lists what a company is hiring for.",
            required=("company_website",),
            outputs={"jobs": "json", "job_links": "json", "descriptions": "json", "locations": "json"},
            providers=(
                Provider(401, "Hirewatch", 1.0, 0.5, ("company_website",)),
                Provider(415, "Careerscan", 1.0, 0.5, ("company_website",)),
                Provider(430, "Jobmesh", 2.0, 0.5, ("company_website",), enabled=False),
            ),
        ),
    )
}

CATEGORIES = ("Verification", "People", "Places")


def _email_check(number: int, name: str, description: str, data_source: str, price: float) -> Enrichment:
    params = (EnrichmentParam("email", "The address to check"),)
    fields = {"email": "text", "status": "text", "reason": "text"}
    return Enrichment(
        number, name, description, data_source, price, params, fields, "Verification", always_answers=True
    )


ENRICHMENTS: Mapping[int, Enrichment] = {
    enrichment.id: enrichment
    for enrichment in (
        _email_check(10, "Verify an email", "Checks whether a mailbox exists.", "Mailproof", 0.01),
        _email_check(
            12, "Verify an email, thoroughly", "Checks whether a mailbox exists and accepts mail.", "Bouncewatch", 0.05
        ),
        Enrichment(
            60,
            "People of a company",
            "Lists people who work at a company, at a price for each of them.",
            "Peoplegrid",
            0.15,
            (
                EnrichmentParam("company_website", "The company's website"),
                EnrichmentParam("limit", "How many people"),
                EnrichmentParam("seniority", "Of this level", required=False, choices=("entry", "senior", "director")),
            ),
            {"first_name": "text", "last_name": "text", "title": "text", "linkedin_url": "url"},
            "People",
            priced_by="limit",
        ),
        Enrichment(
            70,
            "Search places",
            "Lists places on a map, at a price for each page.",
            "Mapfolk",
            1.0,
            (
                EnrichmentParam("query", "What to look for"),
                EnrichmentParam("country", "Where", required=False, choices=("US", "GB", "DE")),
            ),
            {"name": "text", "address": "text", "phone": "phone", "website": "url"},
            "Places",
            per_page=10,
        ),
        Enrichment(
            80,
            "Check a phone number",
            "Type and carrier of a number.",
            "Dialdesk",
            0.1,
            (EnrichmentParam("phone", "The number, with its country code"),),
            {"phone": "phone", "line_type": "text", "carrier": "text"},
            "Verification",
        ),
    )
}

#: Prices in the order of the real API's, by the ids of providers, verifiers and enrichments.
REAL_PRICES: Mapping[int, float] = (
    {701: 4, 833: 4, 966: 5, 745: 6, 113: 6}  # an email
    | {912: 5, 920: 6, 610: 4, 622: 5, 640: 6}  # a person
    | {510: 7, 522: 15, 530: 25, 541: 35}  # a phone
    | {301: 3, 317: 5, 329: 10, 1304: 15, 401: 3, 415: 4, 430: 6}  # a company
    | {10: 0.3, 12: 0.5, 60: 0.15, 70: 3, 80: 3}  # enrichments
)

_LEAD_FLOW: Mapping[str, Any] = {
    "id": "6f2c1d9e-5b1a-4c57-9a86-0b7d8f3e2a10",
    "name": "Lead to phone",
    "description": "Finds the email of a lead, verifies it and looks for a phone number.",
    "inputs": [
        {"id": "first_name", "description": "First name", "type": "text", "required": True},
        {"id": "last_name", "description": "Last name", "type": "text", "required": True},
        {"id": "company", "description": "Name or website", "type": "text", "required": True},
        {"id": "linkedin", "description": "Profile", "type": "text", "required": False},
    ],
    "outputs": [{"id": "email", "response_field_id": 1}, {"id": "phone", "response_field_id": 2}],
    "created_at": "2026-09-01T08:00:00Z",
    "updated_at": "2026-10-12T08:00:00Z",
}
_COMPANY_FLOW: Mapping[str, Any] = {
    "id": "b8a4d7c2-3e0f-4f6d-8c19-5d2e7a9b4c31",
    "name": "Company facts",
    "description": "Describes a company and its open positions.",
    "inputs": [{"id": "company_website", "description": "Website", "type": "text", "required": True}],
    "outputs": [{"id": "company", "response_field_id": 1}],
    "created_at": "2026-09-02T08:00:00Z",
    "updated_at": "2026-09-02T08:00:00Z",
}

#: By id, as `GET /v1/flows` lists them.
FLOWS: Mapping[str, Mapping[str, Any]] = {flow["id"]: flow for flow in (_LEAD_FLOW, _COMPANY_FLOW)}
