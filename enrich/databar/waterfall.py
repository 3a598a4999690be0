"""The API's description of a waterfall: params, fields, providers and their prices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, model_validator

from enrich.databar.lenient_model import CreditAmount, LenientModel, NamedModel, TextLine, read_list
from enrich.job.target import Target, TargetKind
from enrich.models import to_micros


class Choice(LenientModel):
    """A value that a param may have."""

    id: TextLine
    name: TextLine = ""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"id": data} if isinstance(data, str | int | float) else data


def _read_choices(value: object) -> list[Choice]:
    return read_list(Choice, value.get("items") if isinstance(value, dict) else value)


class Param(NamedModel):
    """An input param. `choices` are the only values that it may have; empty: any, or the API does not list them."""

    type: TextLine = "text"
    required: bool = False
    choices: Annotated[list[Choice], BeforeValidator(_read_choices)] = []

    @model_validator(mode="before")
    @classmethod
    def _names_of_enrichments(cls, data: object) -> object:
        return renamed(data, {"is_required": "required", "type_field": "type"})


class Field(NamedModel):
    """An output field."""

    label: TextLine | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_of_enrichments(cls, data: object) -> object:
        return renamed(data, {"display_name": "label"})


def renamed(data: object, names: Mapping[str, str]) -> object:
    """Give keys the names that waterfalls have for the same thing."""
    return {names.get(key, key): value for key, value in data.items()} if isinstance(data, dict) else data


class Provider(LenientModel):
    """A data provider or an email verifier, with its price in credits (number or text). None: unknown."""

    id: int
    name: TextLine = ""
    price: CreditAmount = None
    enabled_by_default: bool = True
    #: Names of the inputs it needs. Empty if the API does not list them.
    params: Annotated[list[str], BeforeValidator(lambda value: [param.name for param in read_list(Param, value)])] = []

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"id": data} if isinstance(data, str | int) and not isinstance(data, bool) else data


class Waterfall(LenientModel):
    """The API's description of a waterfall."""

    identifier: TextLine
    name: TextLine = ""
    description: TextLine | None = None
    input_params: Annotated[list[Param], BeforeValidator(lambda value: read_list(Param, value))] = []
    output_fields: Annotated[list[Field], BeforeValidator(lambda value: read_list(Field, value))] = []
    available_enrichments: Annotated[list[Provider], BeforeValidator(lambda value: read_list(Provider, value))] = []
    is_email_verifying: bool = False
    email_verifiers: Annotated[list[Provider], BeforeValidator(lambda value: read_list(Provider, value))] = []

    @property
    def target(self) -> Target:
        """The target that it describes, without its providers."""
        return Target(TargetKind.WATERFALL, self.identifier)

    @property
    def priced_by(self) -> None:
        """The param that multiplies the price: none."""
        return

    @property
    def is_paginated(self) -> None:
        """Whether it has pages: it has none to choose."""
        return

    def called_providers(self, target: Target) -> list[Provider]:
        """Return the providers that a target names, in order."""
        offered = {provider.id: provider for provider in self.available_enrichments}
        return [offered.get(number, Provider(id=number)) for number in target.enrichments]

    def verifier(self, target: Target) -> Provider | None:
        """Return the verifier that a target names."""
        number = target.email_verifier
        return (
            None
            if number is None
            else next((each for each in self.email_verifiers if each.id == number), Provider(id=number))
        )

    def highest_price(self, target: Target) -> int | None:
        """Return the price when every provider is called and each match verified, in millionths; None: unknown."""
        providers, verifier = self.called_providers(target), self.verifier(target)
        prices = [to_micros(provider.price) for provider in providers]
        checks = [0 if verifier is None else to_micros(verifier.price)] * len(providers)
        known = [price for price in prices + checks if price is not None]
        return sum(known) if len(known) == len(prices + checks) else None


#: Month in which the API documentation was read.
DOCUMENTED_ON = "2026-11"


def _make_documented(
    identifier: str, name: str, required: str, fields: str = "", *, verifying: bool = False
) -> Waterfall:
    return Waterfall(
        identifier=identifier,
        name=name,
        input_params=[Param(name=param, required=True) for param in required.split()],
        output_fields=[Field(name=field) for field in fields.split()],
        is_email_verifying=verifying,
    )


#: Params and, if documented, fields. Providers and prices are only available from the API.
DOCUMENTED_WATERFALLS: dict[str, Waterfall] = {
    waterfall.identifier: waterfall
    for waterfall in (
        _make_documented("email_getter", "Email finder", "first_name last_name company", "email", verifying=True),
        _make_documented("person_getter", "Person finder", "email", "first_name last_name linkedin_url"),
        _make_documented("company_lookup", "Company lookup", "company_website"),
        _make_documented("person_by_link", "Person by link", "link"),
        _make_documented("phone_getter", "Phone finder", "linkedin"),
        _make_documented("job_postings_getter", "Job postings", "company_website"),
    )
}
