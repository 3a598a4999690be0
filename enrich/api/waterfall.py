"""What the API says of its waterfalls and of the account; unknown keys and both kinds of price are fine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator, model_validator


class _Lenient(BaseModel):
    """What comes from the API: unknown keys are fine, and null is as good as left out."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class Param(_Lenient):
    """An input of a waterfall."""

    name: str
    type: str = "text"
    required: bool = False


class Field(_Lenient):
    """An output of a waterfall."""

    name: str
    label: str | None = None


class Provider(_Lenient):
    """A data provider or a verifier with its price in credits (number or text)."""

    id: int
    name: str = ""
    price: float | str | None = None
    enabled_by_default: bool = True
    #: The inputs that it needs; empty when the API does not tell.
    params: list[str] = []

    @field_validator("params", mode="before")
    @classmethod
    def _names(cls, params: object) -> list[str]:
        return [name for name in params if isinstance(name, str)] if isinstance(params, list) else []


class Waterfall(_Lenient):
    """What the API says of a waterfall."""

    identifier: str
    name: str = ""
    description: str | None = None
    input_params: list[Param] = []
    output_fields: list[Field] = []
    available_enrichments: list[Provider] = []
    is_email_verifying: bool = False
    email_verifiers: list[Provider] = []


class User(_Lenient):
    """Whose key it is; `balance` in credits."""

    balance: float | str | None = None
    workspace: str | None = None
