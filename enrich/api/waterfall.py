"""What the API says of its waterfalls and of the account, read leniently.

Unknown keys are fine, a value of the wrong kind counts as left out, and a list loses only its broken items. What has
no name of its own (`identifier`, `id`, `name`) is refused.
"""

from __future__ import annotations

from contextlib import suppress
from math import isfinite
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from enrich.api.outside_text import clean_line


def _read_line(value: object) -> object:
    """Read a text as one line, and a number as text."""
    readable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return clean_line(str(value)) if readable else value


def _read_credits(value: object) -> object:
    """Read credits; what is no number and no text is not known."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if isfinite(value) else None
    return clean_line(value) if isinstance(value, str) else None


def _read_workspace(value: object) -> object:
    return _read_line(value.get("name", value.get("id")) if isinstance(value, dict) else value)


TextLine = Annotated[str, BeforeValidator(_read_line)]
CreditAmount = Annotated[float | str | None, BeforeValidator(_read_credits)]


class _LenientModel(BaseModel):
    """What comes from the API: null is as good as left out, and so is what cannot be read, where it may be."""

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
    """Read a list, or names with commas between them, without what is broken."""
    items = values.split(",") if isinstance(values, str) else values if isinstance(values, list) else []
    read = []
    for item in items:
        with suppress(ValidationError):
            read.append(kind.model_validate(item))
    return read


class _NamedModel(_LenientModel):
    """What may be written as its name alone."""

    name: TextLine

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"name": data.strip()} if isinstance(data, str) and data.strip() else data


class Param(_NamedModel):
    """An input of a waterfall."""

    type: TextLine = "text"
    required: bool = False


class Field(_NamedModel):
    """An output of a waterfall."""

    label: TextLine | None = None


class Provider(_LenientModel):
    """A data provider or a verifier with its price in credits (number or text)."""

    id: int
    name: TextLine = ""
    price: CreditAmount = None
    enabled_by_default: bool = True
    #: The inputs that it needs; empty when the API does not tell.
    params: Annotated[list[str], BeforeValidator(lambda value: [param.name for param in _read_list(Param, value)])] = []

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"id": data} if isinstance(data, str | int) and not isinstance(data, bool) else data


class Waterfall(_LenientModel):
    """What the API says of a waterfall."""

    identifier: TextLine
    name: TextLine = ""
    description: TextLine | None = None
    input_params: Annotated[list[Param], BeforeValidator(lambda value: _read_list(Param, value))] = []
    output_fields: Annotated[list[Field], BeforeValidator(lambda value: _read_list(Field, value))] = []
    available_enrichments: Annotated[list[Provider], BeforeValidator(lambda value: _read_list(Provider, value))] = []
    is_email_verifying: bool = False
    email_verifiers: Annotated[list[Provider], BeforeValidator(lambda value: _read_list(Provider, value))] = []


class User(_LenientModel):
    """Whose key it is; `balance` in credits."""

    balance: CreditAmount = None
    workspace: Annotated[str, BeforeValidator(_read_workspace)] | None = None
