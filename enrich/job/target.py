"""The target of the requests, a waterfall or an enrichment, and the part of the job file about it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal
from urllib.parse import quote

from msgspec import Struct
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from enrich.job.field_types import Columns, StrictModel, Text, check_text


class TargetKind(StrEnum):
    """The kind of target: its key in the job file, and a part of the API's addresses."""

    WATERFALL = "waterfall"
    ENRICHMENT = "enrichment"


class Target(Struct, frozen=True):
    """The waterfall or enrichment that gets the params of each row. A request is a target with params.

    `enrichments` are the provider ids of a waterfall, in order. `pages` is how many an enrichment fetches.
    """

    kind: TargetKind
    id: str
    enrichments: tuple[int, ...] = ()
    email_verifier: int | None = None
    pages: int = 1

    @classmethod
    def from_json(cls, call: Mapping[str, Any]) -> Target:
        """Return the target of a canonical text that was parsed."""
        kind = next(kind for kind in TargetKind if kind in call)
        pages = call.get("pagination", {}).get("pages", 1)
        return cls(kind, str(call[kind]), tuple(call.get("enrichments", ())), call.get("email_verifier"), pages)

    def as_json(self) -> dict[str, Any]:
        """Return the target as an object: its body, and its id under its kind."""
        return self.body() | {self.kind.value: self.id if self.kind is TargetKind.WATERFALL else int(self.id)}

    def canonical(self) -> str:
        """Return the target as canonical JSON: equal targets have equal text."""
        return json.dumps(self.as_json(), sort_keys=True)

    def body(self) -> dict[str, Any]:
        """Return the request body without `params`."""
        if self.kind is TargetKind.ENRICHMENT:
            # The API returns one page by default.
            return {} if self.pages == 1 else {"pagination": {"pages": self.pages}}
        verifier = {} if self.email_verifier is None else {"email_verifier": self.email_verifier}
        return {"enrichments": list(self.enrichments), **verifier}

    def body_prefix(self) -> str:
        """Return the beginning of every request body. The params and a closing brace follow."""
        inner = json.dumps(self.body())[1:-1]
        return f'{{{inner}{", " if inner else ""}"params": '

    @property
    def path(self) -> str:
        """The API's path of its description, which begins those of its runs."""
        return f"/{self.kind}s/{quote(self.id, safe='')}"

    @property
    def title(self) -> str:
        """Its name in a list. The number of an enrichment alone would not show what it is."""
        return self.id if self.kind is TargetKind.WATERFALL else f"{self.kind} {self.id}"

    @property
    def label(self) -> str:
        """Its name in a sentence."""
        return f"the {self.kind} `{self.id}`"


#: The column that `enrich init` writes for a param to which it found none.
UNFILLED_COLUMN = "FILL THIS IN"
Transform = Literal["trim", "lower", "domain", "host"]

_COLUMNS_DESCRIPTION = "A column, or several: the first that is not blank after the transforms is used."
_TRANSFORM_DESCRIPTION = "In this order: trim, lower, domain (of the company), host (unchanged)."


class Source(StrictModel):
    """One of several sources of a param: columns with transforms of their own."""

    columns: Columns = Field(alias="column", description=_COLUMNS_DESCRIPTION)
    transform: list[Transform] = Field([], description=_TRANSFORM_DESCRIPTION)


#: Internal key for the list form of a param. It is not part of the file format.
SOURCES_KEY = "[sources]"


class Param(StrictModel):
    """Where a param's value comes from: columns of the input, or a constant."""

    listed_columns: Columns = Field([], alias="column", description=_COLUMNS_DESCRIPTION)
    transform: list[Transform] = Field([], description=_TRANSFORM_DESCRIPTION)
    value: Annotated[str | None, BeforeValidator(check_text), Field(min_length=1)] = Field(
        None, description="A constant, in quotes."
    )
    listed_sources: Annotated[list[Source], Field(min_length=1)] | None = Field(None, alias=SOURCES_KEY)

    @model_validator(mode="after")
    def _check_one_source(self) -> Param:
        if self.listed_sources is None and bool(self.listed_columns) == (self.value is not None):
            raise ValueError("needs either `column` or `value`")
        if self.value is not None and self.transform:
            raise ValueError("a constant `value` has no `transform`")
        return self

    @property
    def sources(self) -> list[tuple[str, list[Transform]]]:
        """The columns in the order in which they are tried, each with its transforms. A constant has none."""
        listed = self.listed_sources
        if listed is None:
            return [(column, self.transform) for column in self.listed_columns]
        return [(column, source.transform) for source in listed for column in source.columns]

    @property
    def columns(self) -> list[str]:
        """The columns in the order in which they are tried."""
        return list(dict.fromkeys(column for column, _ in self.sources))

    def only_from(self, column: str) -> Param:
        """Return this param with only the sources that read a column."""
        sources = [Source(column=[column], transform=transform) for name, transform in self.sources if name == column]
        return Param.model_validate({SOURCES_KEY: sources})


def _expand_params(value: object) -> object:
    return {name: _expand_param(param) for name, param in value.items()} if isinstance(value, dict) else value


def _expand_param(param: object) -> object:
    if isinstance(param, list) and any(isinstance(source, dict) for source in param):
        return {SOURCES_KEY: [source if isinstance(source, dict) else {"column": source} for source in param]}
    return param if isinstance(param, dict) else {"column": param}


def _check_identifier(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", value):  # it becomes part of a URL
        raise ValueError("must be an identifier such as email_getter")
    return value


class Pagination(StrictModel):
    """How much of a list is fetched."""

    pages: Annotated[int, Field(ge=1, le=100)] = Field(description="How many pages; each is charged.")


class TargetModel(StrictModel):
    """The target, its params, and the new columns."""

    enrichment: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The enrichment's id, instead of a waterfall; `enrich enrichments` lists them."
    )
    waterfall: Annotated[Text, AfterValidator(_check_identifier)] | None = Field(
        None,
        validate_default=True,
        description="The waterfall's identifier, instead of an enrichment; `enrich waterfalls` lists them.",
    )
    enrichments: Annotated[list[int], Field(min_length=1)] | None = Field(
        None, description="The providers of the waterfall, in their order; default: those enabled by default."
    )
    email_verifier: int | None = Field(None, description="A verifier of the waterfall.")
    pagination: Pagination | None = Field(None, description="For an enrichment with pages, each at a price.")
    params: Annotated[dict[Text, Param], Field(min_length=1), BeforeValidator(_expand_params)] = Field(
        description="The params of the waterfall or enrichment: a column, or an object."
    )
    columns: Annotated[dict[Text, Text], Field(min_length=1)] | None = Field(
        None,
        description="New column: field of the result (dotted path), or a `$` path: $is_verified, $steps.0.provider, "
        "$enrichment_data.NAME.title; default: all fields of the result.",
    )

    @field_validator("waterfall")
    @classmethod
    def _check_one_target(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("enrichment", 0) is None:
            raise ValueError("is missing")
        if value is not None and info.data.get("enrichment") is not None:
            raise ValueError("a job has either a `waterfall` or an `enrichment`")
        return value

    @field_validator("enrichments", "email_verifier")
    @classmethod
    def _check_waterfall_keys(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("enrichment") is not None:
            raise ValueError("is for waterfalls, and this is an enrichment")
        return value

    @field_validator("pagination")
    @classmethod
    def _check_enrichment_keys(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("waterfall") is not None:
            raise ValueError("is for enrichments, and this is a waterfall")
        return value

    @property
    def target(self) -> Target:
        """The target. Its `enrichments` are empty where the file names none."""
        if self.enrichment is not None:
            pages = 1 if self.pagination is None else self.pagination.pages
            return Target(TargetKind.ENRICHMENT, str(self.enrichment), pages=pages)
        return Target(TargetKind.WATERFALL, self.waterfall or "", tuple(self.enrichments or ()), self.email_verifier)
