"""The API's descriptions of the account, waterfalls and enrichments, and the differences between two descriptions.

It is parsed leniently: unknown keys are ignored, a value of the wrong type counts as missing, and a list loses only its
invalid items. An object without its key field (`identifier`, `id` or `name`) is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from enrich.databar.text_filter import clean_line
from enrich.job.target import Target, TargetKind
from enrich.models import MAX_CREDITS, pluralize, to_credits, to_micros


def _read_line(value: object) -> object:
    """Convert text to one line, and a number to text. Other values stay as they are."""
    readable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return clean_line(str(value)) if readable else value


def _read_credits(value: object) -> object:
    """Return credits as a number or as text. None (unknown) for any other value, and for a number out of range."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if -MAX_CREDITS <= value <= MAX_CREDITS else None
    return clean_line(value) if isinstance(value, str) else None


TextLine = Annotated[str, BeforeValidator(_read_line)]
CreditAmount = Annotated[float | str | None, BeforeValidator(_read_credits)]


class LenientModel(BaseModel):
    """Base of the API models. Null counts as missing, and so does an unreadable value of an optional field."""

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)
    #: The field whose value the API may write alone, in place of an object.
    short_form: ClassVar[str | None] = None
    #: The names that an enrichment has for what a waterfall has, too.
    other_names: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _drop_unreadable(cls, data: Any, read: ModelWrapValidatorHandler[LenientModel]) -> LenientModel:  # noqa: ANN401 - JSON
        is_value = isinstance(data, str | int | float) and not isinstance(data, bool) and str(data).strip()
        if cls.short_form is not None and is_value:
            data = {cls.short_form: data}
        if not isinstance(data, dict):
            return read(data)
        known = {cls.other_names.get(key, key): value for key, value in data.items() if value is not None}
        try:
            return read(known)
        except ValidationError as error:
            broken = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
            return read({key: value for key, value in known.items() if key not in broken})


M = TypeVar("M", bound=LenientModel)


def _read_list(kind: type[M], values: object) -> list[M]:
    """Parse a list, or comma-separated names, into models. Invalid items are left out."""
    items = values.split(",") if isinstance(values, str) else values if isinstance(values, list) else []
    read = []
    for item in items:
        with suppress(ValidationError):
            read.append(kind.model_validate(item))
    return read


def _read_workspace(value: object) -> object:
    name = _read_line(value.get("name", value.get("id")) if isinstance(value, dict) else value)
    return None if isinstance(name, str) and not name.strip() else name


class User(LenientModel):
    """The account of the API key. `balance` is in credits, None if unknown."""

    balance: CreditAmount = None
    workspace: Annotated[str, BeforeValidator(_read_workspace)] | None = None


class Choice(LenientModel):
    """A value that a param may have."""

    short_form = "id"

    id: TextLine
    name: TextLine = ""


def _read_choices(value: object) -> list[Choice]:
    return _read_list(Choice, value.get("items") if isinstance(value, dict) else value)


class Param(LenientModel):
    """An input param. `choices` are the only values that it may have; empty: any, or the API does not list them."""

    short_form = "name"
    other_names = {"is_required": "required", "type_field": "type"}

    name: TextLine
    type: TextLine = "text"
    required: bool = False
    choices: Annotated[list[Choice], BeforeValidator(_read_choices)] = []


class Field(LenientModel):
    """An output field."""

    short_form = "name"
    other_names = {"display_name": "label"}

    name: TextLine
    label: TextLine | None = None


class Provider(LenientModel):
    """A data provider or an email verifier, with its price in credits (number or text). None: unknown."""

    short_form = "id"

    id: int
    name: TextLine = ""
    price: CreditAmount = None
    enabled_by_default: bool = True
    #: Names of the inputs it needs. Empty if the API does not list them.
    params: Annotated[list[str], BeforeValidator(lambda value: [param.name for param in _read_list(Param, value)])] = []


def _read_providers(values: object) -> list[Provider]:
    """Parse a list of providers. One that the API lists twice is kept once, where it is first."""
    unique: dict[int, Provider] = {}
    for provider in _read_list(Provider, values):
        unique.setdefault(provider.id, provider)
    return list(unique.values())


Params = Annotated[list[Param], BeforeValidator(partial(_read_list, Param))]
Fields = Annotated[list[Field], BeforeValidator(partial(_read_list, Field))]
Providers = Annotated[list[Provider], BeforeValidator(_read_providers)]


class Waterfall(LenientModel):
    """The API's description of a waterfall."""

    #: No param multiplies its price, and it has no pages.
    priced_by: ClassVar[None] = None
    is_paginated: ClassVar[None] = None

    identifier: TextLine
    name: TextLine = ""
    description: TextLine | None = None
    input_params: Params = []
    output_fields: Fields = []
    available_enrichments: Providers = []
    is_email_verifying: bool = False
    email_verifiers: Providers = []

    @property
    def target(self) -> Target:
        """The target that it describes, without its providers."""
        return Target(TargetKind.WATERFALL, self.identifier)

    def called_providers(self, target: Target) -> list[Provider]:
        """Return the providers that a target names, in order."""
        offered = {provider.id: provider for provider in self.available_enrichments}
        return [offered.get(number, Provider(id=number)) for number in target.enrichments]

    def verifier(self, target: Target) -> Provider | None:
        """Return the verifier that a target names."""
        if (number := target.email_verifier) is None:
            return None
        return next((each for each in self.email_verifiers if each.id == number), Provider(id=number))

    def highest_price(self, target: Target) -> int | None:
        """Return the price when every provider is called and each match verified, in millionths; None: unknown."""
        providers, verifier = self.called_providers(target), self.verifier(target)
        prices = [to_micros(provider.price) for provider in providers]
        checks = [0 if verifier is None else to_micros(verifier.price)] * len(providers)
        known = [price for price in prices + checks if price is not None]
        return sum(known) if len(known) == len(prices + checks) else None


class Pricing(LenientModel):
    """How a request is priced: `fixed`, or `per_parameter`: multiplied by the value of the param `parameter`."""

    type: TextLine = "fixed"
    parameter: TextLine | None = None


class Pages(LenientModel):
    """Whether the result is a list with pages, each of them with its price."""

    supported: bool = False
    per_page: int | None = None


class Enrichment(LenientModel):
    """The API's description of an enrichment. A list of the API has no params and no fields."""

    #: What it finds cannot be verified.
    is_email_verifying: ClassVar[bool] = False
    email_verifiers: ClassVar[Sequence[Provider]] = ()
    other_names = {"params": "input_params", "response_fields": "output_fields"}

    id: int
    name: TextLine = ""
    description: TextLine | None = None
    data_source: TextLine = ""
    price: CreditAmount = None
    pricing: Pricing = Pricing()
    pagination: Pages | None = None
    input_params: Params = []
    output_fields: Fields = []

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
    def priced_by(self) -> str | None:
        """The param that multiplies the price."""
        return self.pricing.parameter if self.pricing.type == "per_parameter" else None

    @property
    def is_paginated(self) -> bool | None:
        """Whether it has pages; None: unknown."""
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

    @property
    def price_text(self) -> str:
        """Its price in words."""
        if self.highest_price(self.target) is None:
            return "price unknown"
        unit = f" for each {self.priced_by}" if self.priced_by else ""
        return f"{format_price(self.price)}{unit}{' for each page' if self.is_paginated else ''}"


Description: TypeAlias = Waterfall | Enrichment

MODELS: Mapping[TargetKind, type[Waterfall | Enrichment]] = {
    TargetKind.WATERFALL: Waterfall,
    TargetKind.ENRICHMENT: Enrichment,
}


def parse_description(kind: TargetKind, description: Mapping[str, Any]) -> Description:
    """Read a description as the ledger stores it. Raises ValidationError."""
    return MODELS[kind].model_validate(description)


def description_changes(before: Description, now: Description) -> Iterator[str]:
    """Yield a line of text for each difference that may affect a job."""
    old = {param.name: param.required for param in before.input_params}
    new = {param.name: param.required for param in now.input_params}
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"param {name}: removed"
        elif name not in old:
            yield f"param {name}: new{', required' if new[name] else ''}"
        elif old[name] != new[name]:
            yield f"param {name}: {'now required' if new[name] else 'no longer required'}"
    fields = [field.name for field in before.output_fields], [field.name for field in now.output_fields]
    yield from (f"field {name}: removed" for name in fields[0] if name not in fields[1])
    yield from (f"field {name}: new" for name in fields[1] if name not in fields[0])
    yield from _provider_changes("provider", before.available_enrichments, now.available_enrichments)
    yield from _provider_changes("verifier", before.email_verifiers, now.email_verifiers)
    defaults = [each.id for each in now.available_enrichments if each.enabled_by_default]
    if defaults != [each.id for each in before.available_enrichments if each.enabled_by_default]:
        yield f"default providers: now {', '.join(map(str, defaults)) or 'none'}; runs keep the old ones"
    if before.priced_by != now.priced_by:
        yield f"price: now {'fixed' if now.priced_by is None else f'for each unit of {now.priced_by}'}"
    if bool(before.is_paginated) != bool(now.is_paginated):
        yield f"pages: now {'each with its price' if now.is_paginated else 'none'}"


def _provider_changes(kind: str, before: Sequence[Provider], now: Sequence[Provider]) -> Iterator[str]:
    old, new = {each.id: each for each in before}, {each.id: each for each in now}
    for number in [*old, *(number for number in new if number not in old)]:
        name = f"{kind} {number} {(new.get(number) or old[number]).name}".rstrip()
        if number not in new:
            yield f"{name}: removed"
        elif number not in old:
            yield f"{name}: new, {format_price(new[number].price)}"
        elif to_micros(old[number].price) != to_micros(new[number].price):
            before_micros, now_micros = to_micros(old[number].price), to_micros(new[number].price)
            trend = ""
            if before_micros is not None and now_micros is not None:
                trend = " (more expensive)" if now_micros > before_micros else " (cheaper)"
            yield f"{name}: {format_price(old[number].price)} before, {format_price(new[number].price)} now{trend}"


def format_price(price: CreditAmount) -> str:
    """Return a price in words."""
    micros = to_micros(price)
    return "price unknown" if micros is None else pluralize(to_credits(micros), "credit")


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
