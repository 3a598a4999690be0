"""The base of the models that the API sends. They are parsed leniently.

Unknown keys are ignored. A value of the wrong type counts as missing. A list loses only its invalid items. An object
without its key field (`identifier`, `id` or `name`) is rejected.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from enrich.databar.text_filter import clean_line
from enrich.models import MAX_CREDITS


def read_line(value: object) -> object:
    """Convert text to one line, and a number to text. Other values stay as they are."""
    readable = isinstance(value, str | int | float) and not isinstance(value, bool)
    return clean_line(str(value)) if readable else value


def _read_credits(value: object) -> object:
    """Return credits as a number or as text. None (unknown) for any other value, and for a number out of range."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if -MAX_CREDITS <= value <= MAX_CREDITS else None
    return clean_line(value) if isinstance(value, str) else None


TextLine = Annotated[str, BeforeValidator(read_line)]
CreditAmount = Annotated[float | str | None, BeforeValidator(_read_credits)]


class LenientModel(BaseModel):
    """Base of the API models. Null counts as missing, and so does an unreadable value of an optional field."""

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    @model_validator(mode="wrap")
    @classmethod
    def _drop_unreadable(cls, data: Any, read: ModelWrapValidatorHandler[LenientModel]) -> LenientModel:  # noqa: ANN401 - JSON
        if not isinstance(data, dict):
            return read(data)
        known = {key: value for key, value in data.items() if value is not None}
        try:
            return read(known)
        except ValidationError as error:
            broken = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
            return read({key: value for key, value in known.items() if key not in broken})


M = TypeVar("M", bound=LenientModel)


def read_list(kind: type[M], values: object) -> list[M]:
    """Parse a list, or comma-separated names, into models. Invalid items are left out."""
    items = values.split(",") if isinstance(values, str) else values if isinstance(values, list) else []
    read = []
    for item in items:
        with suppress(ValidationError):
            read.append(kind.model_validate(item))
    return read


class NamedModel(LenientModel):
    """Base of the models that the API may also write as their name alone."""

    name: TextLine

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"name": data.strip()} if isinstance(data, str) and data.strip() else data
