"""The sandbox's enrichments, with invented sources and prices: two verifiers, one priced by a param, one with pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from enrich.sandbox.money import to_micros

#: Most pages of one run.
MAX_PAGES = 100


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


@dataclass(frozen=True, slots=True)
class Enrichment:
    """One source that is asked by itself.

    `priced_by` is the param that the price is multiplied with. `per_page` is the number of rows on a page; None: its
    result is one row. `cost` is in millionths.
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
    cost: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost", to_micros(self.price))

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


CATEGORIES = ("Verification", "People", "Places")
_EMAIL = (EnrichmentParam("email", "The address to check"),)
_MAILBOX = {"email": "text", "status": "text", "reason": "text"}

ENRICHMENTS: Mapping[int, Enrichment] = {
    enrichment.id: enrichment
    for enrichment in (
        Enrichment(
            10,
            "Verify an email",
            "Checks whether a mailbox exists.",
            "Mailproof",
            0.01,
            _EMAIL,
            _MAILBOX,
            "Verification",
            always_answers=True,
        ),
        Enrichment(
            12,
            "Verify an email, thoroughly",
            "Checks whether a mailbox exists and accepts mail.",
            "Bouncewatch",
            0.05,
            _EMAIL,
            _MAILBOX,
            "Verification",
            always_answers=True,
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
