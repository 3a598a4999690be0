"""Models of the API's waterfalls and account, with lenient parsing.

Unknown keys are ignored. A value of the wrong type counts as missing. A list loses only its invalid items. An object
without its key field (`identifier`, `id` or `name`) is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from math import isfinite
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from enrich.databar.outside_text import clean_line
from enrich.models import to_credits, to_micros


def _read_line(value: object) -> object:
    """Convert text to one line, and a number to text. Other values stay as they are."""
    readable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return clean_line(str(value)) if readable else value


def _read_credits(value: object) -> object:
    """Return credits as a finite number or as text. None (unknown) for any other value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if isfinite(value) else None
    return clean_line(value) if isinstance(value, str) else None


def _read_workspace(value: object) -> object:
    return _read_line(value.get("name", value.get("id")) if isinstance(value, dict) else value)


TextLine = Annotated[str, BeforeValidator(_read_line)]
CreditAmount = Annotated[float | str | None, BeforeValidator(_read_credits)]


class _LenientModel(BaseModel):
    """Base of the API models. Null counts as missing, and so does an unreadable value of an optional field."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _drop_unreadable(cls, data: Any, read: ModelWrapValidatorHandler[_LenientModel]) -> _LenientModel:  # noqa: ANN401 - JSON
        if not isinstance(data, dict):
            return read(data)
        known = {key: value for key, value in data.items() if value is not None}
        try:
            return read(known)
        except ValidationError as error:
            broken = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
            return read({key: value for key, value in known.items() if key not in broken})


M = TypeVar("M", bound=_LenientModel)


def _read_list(kind: type[M], values: object) -> list[M]:
    """Parse a list, or comma-separated names, into models. Invalid items are left out."""
    items = values.split(",") if isinstance(values, str) else values if isinstance(values, list) else []
    read = []
    for item in items:
        with suppress(ValidationError):
            read.append(kind.model_validate(item))
    return read


class _NamedModel(_LenientModel):
    """A model that the API may also write as its name alone."""

    name: TextLine

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"name": data.strip()} if isinstance(data, str) and data.strip() else data


class Param(_NamedModel):
    """An input param of a waterfall."""

    type: TextLine = "text"
    required: bool = False


class Field(_NamedModel):
    """An output field of a waterfall."""

    label: TextLine | None = None


class Provider(_LenientModel):
    """A data provider or an email verifier, with its price in credits (number or text). None: unknown."""

    id: int
    name: TextLine = ""
    price: CreditAmount = None
    enabled_by_default: bool = True
    #: Names of the inputs it needs. Empty if the API does not list them.
    params: Annotated[list[str], BeforeValidator(lambda value: [param.name for param in _read_list(Param, value)])] = []

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"id": data} if isinstance(data, str | int) and not isinstance(data, bool) else data


class Waterfall(_LenientModel):
    """The API's description of a waterfall."""

    identifier: TextLine
    name: TextLine = ""
    description: TextLine | None = None
    input_params: Annotated[list[Param], BeforeValidator(lambda value: _read_list(Param, value))] = []
    output_fields: Annotated[list[Field], BeforeValidator(lambda value: _read_list(Field, value))] = []
    available_enrichments: Annotated[list[Provider], BeforeValidator(lambda value: _read_list(Provider, value))] = []
    is_email_verifying: bool = False
    email_verifiers: Annotated[list[Provider], BeforeValidator(lambda value: _read_list(Provider, value))] = []


class User(_LenientModel):
    """The account of the API key. `balance` is in credits, None if unknown."""

    balance: CreditAmount = None
    workspace: Annotated[str, BeforeValidator(_read_workspace)] | None = None


def waterfall_changes(before: Waterfall, now: Waterfall) -> Iterator[str]:
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


def _provider_changes(kind: str, before: list[Provider], now: list[Provider]) -> Iterator[str]:
    old, new = {each.id: each for each in before}, {each.id: each for each in now}
    for number in [*old, *(number for number in new if number not in old)]:
        name = f"{kind} {number} {(new.get(number) or old[number]).name}".rstrip()
        if number not in new:
            yield f"{name}: removed"
        elif number not in old:
            yield f"{name}: new, {_price_text(new[number])}"
        elif to_micros(old[number].price) != to_micros(new[number].price):
            yield (
                f"{name}: {_price_text(old[number])} before, "
                f"{_price_text(new[number])} now{_price_trend(old[number], new[number])}"
            )


def _price_text(provider: Provider) -> str:
    micros = to_micros(provider.price)
    return "price unknown" if micros is None else f"{to_credits(micros):g} credits"


def _price_trend(old: Provider, new: Provider) -> str:
    before, now = to_micros(old.price), to_micros(new.price)
    if before is None or now is None:
        return ""
    return " (dearer)" if now > before else " (cheaper)"


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
