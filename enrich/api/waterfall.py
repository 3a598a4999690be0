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


def _word(value: object) -> object:
    """Read a text as one line, and a number as text."""
    readable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return clean_line(str(value)) if readable else value


def _amount(value: object) -> object:
    """Read credits; what is no number and no text is not known."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if isfinite(value) else None
    return clean_line(value) if isinstance(value, str) else None


def _workspace(value: object) -> object:
    return _word(value.get("name", value.get("id")) if isinstance(value, dict) else value)


Word = Annotated[str, BeforeValidator(_word)]
Amount = Annotated[float | str | None, BeforeValidator(_amount)]


class _Lenient(BaseModel):
    """What comes from the API: null is as good as left out, and so is what cannot be read, where it may be."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _readable(cls, data: Any, read: ModelWrapValidatorHandler[_Lenient]) -> _Lenient:  # noqa: ANN401 - JSON
        if not isinstance(data, dict):
            return read(data)
        known = {key: value for key, value in data.items() if value is not None}
        try:
            return read(known)
        except ValidationError as error:
            broken = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
            return read({key: value for key, value in known.items() if key not in broken})


M = TypeVar("M", bound=_Lenient)


def _each(kind: type[M], listed: object) -> list[M]:
    """Read a list, or names with commas between them, without what is broken."""
    items = listed.split(",") if isinstance(listed, str) else listed if isinstance(listed, list) else []
    read = []
    for item in items:
        with suppress(ValidationError):
            read.append(kind.model_validate(item))
    return read


class _Named(_Lenient):
    """What may be written as its name alone."""

    name: Word

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"name": data.strip()} if isinstance(data, str) and data.strip() else data


class Param(_Named):
    """An input of a waterfall."""

    type: Word = "text"
    required: bool = False


class Field(_Named):
    """An output of a waterfall."""

    label: Word | None = None


class Provider(_Lenient):
    """A data provider or a verifier with its price in credits (number or text)."""

    id: int
    name: Word = ""
    price: Amount = None
    enabled_by_default: bool = True
    #: The inputs that it needs; empty when the API does not tell.
    params: Annotated[list[str], BeforeValidator(lambda value: [param.name for param in _each(Param, value)])] = []

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"id": data} if isinstance(data, str | int) and not isinstance(data, bool) else data


class Waterfall(_Lenient):
    """What the API says of a waterfall."""

    identifier: Word
    name: Word = ""
    description: Word | None = None
    input_params: Annotated[list[Param], BeforeValidator(lambda value: _each(Param, value))] = []
    output_fields: Annotated[list[Field], BeforeValidator(lambda value: _each(Field, value))] = []
    available_enrichments: Annotated[list[Provider], BeforeValidator(lambda value: _each(Provider, value))] = []
    is_email_verifying: bool = False
    email_verifiers: Annotated[list[Provider], BeforeValidator(lambda value: _each(Provider, value))] = []


class User(_Lenient):
    """Whose key it is; `balance` in credits."""

    balance: Amount = None
    workspace: Annotated[str, BeforeValidator(_workspace)] | None = None
