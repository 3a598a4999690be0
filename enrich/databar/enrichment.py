"""The API's description of an enrichment: params, fields, and how its price comes about."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, model_validator

from enrich.databar.lenient_model import CreditAmount, LenientModel, TextLine, read_list
from enrich.databar.waterfall import Field, Param, Provider, renamed
from enrich.job.target import Target, TargetKind
from enrich.models import to_micros


class Pricing(LenientModel):
    """How the price of a request comes about: `fixed`, or `per_parameter`: multiplied with the value of a param."""

    type: TextLine = "fixed"
    parameter: TextLine | None = None


class Pages(LenientModel):
    """Whether the result is a list with pages, each of them with its price."""

    supported: bool = False
    per_page: int | None = None


class Enrichment(LenientModel):
    """The API's description of an enrichment. A list of the API has no params and no fields."""

    id: int
    name: TextLine = ""
    description: TextLine | None = None
    data_source: TextLine = ""
    price: CreditAmount = None
    pricing: Pricing = Pricing()
    pagination: Pages | None = None
    input_params: Annotated[list[Param], BeforeValidator(lambda value: read_list(Param, value))] = []
    output_fields: Annotated[list[Field], BeforeValidator(lambda value: read_list(Field, value))] = []

    @model_validator(mode="before")
    @classmethod
    def _names_of_waterfalls(cls, data: object) -> object:
        return renamed(data, {"params": "input_params", "response_fields": "output_fields"})

    @property
    def identifier(self) -> str:
        """The id as text."""
        return str(self.id)

    @property
    def source(self) -> str:
        """The name of its one source."""
        return self.data_source or self.name or self.identifier

    @property
    def target(self) -> Target:
        """The target that it describes, without pages."""
        return Target(TargetKind.ENRICHMENT, self.identifier)

    @property
    def available_enrichments(self) -> list[Provider]:
        """Its one source."""
        return [Provider(id=self.id, name=self.name, price=self.price)]

    @property
    def is_email_verifying(self) -> bool:
        """Whether what it finds can be verified: it cannot."""
        return False

    @property
    def email_verifiers(self) -> list[Provider]:
        """The verifiers: none."""
        return []

    @property
    def priced_by(self) -> str | None:
        """The param that multiplies the price."""
        return self.pricing.parameter if self.pricing.type == "per_parameter" else None

    @property
    def is_paginated(self) -> bool | None:
        """Whether it has pages; None: the API does not say."""
        return None if self.pagination is None else self.pagination.supported

    def called_providers(self, _: Target) -> list[Provider]:
        """Return its one source."""
        return self.available_enrichments

    def verifier(self, _: Target) -> None:
        """Return the verifier that a target names: none."""
        return

    def highest_price(self, target: Target) -> int | None:
        """Return the price of all pages in millionths, for one unit of `priced_by` if it has one; None: unknown."""
        price = to_micros(self.price)
        is_known = self.pricing.type == "fixed" or self.priced_by is not None
        return price * target.pages if price is not None and is_known else None
