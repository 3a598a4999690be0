"""Turns a job and a description into a request template: the target, its highest price, its params, its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from enrich.databar.description import Description, Waterfall
from enrich.job.job import Job
from enrich.job.target import Target, TargetKind
from enrich.rows.known_names import is_count, join_problems, spellings_of, target_problems


class RequestTemplate(Struct, frozen=True):
    """What all requests of a job have in common.

    `required_params` and `email_params` are names of params. `columns` maps new columns to dotted paths. `unit_price`
    is the highest price in millionths of a credit, for one unit of the param `priced_by` if that is set; None: the API
    gives no price.
    """

    target: Target
    required_params: tuple[str, ...]
    email_params: tuple[str, ...]
    columns: Mapping[str, str]
    unit_price: int | None
    priced_by: str | None = None
    #: The values that a param may have: a spelling in lower case to the value that is sent.
    choices: Mapping[str, Mapping[str, str]] = {}
    #: The name of the one source, where answers name none.
    source: str | None = None

    @property
    def worst_price(self) -> int | None:
        """The highest price of any request, in millionths. None: not known, or it depends on the row."""
        return self.unit_price if self.priced_by is None else None


def template_of_unknown_target(job: Job) -> RequestTemplate:
    """Return the template of a target that the API has not described yet."""
    return RequestTemplate(job.model.target, (), (), job.model.columns or {}, None)


def default_providers(description: Description) -> list[int]:
    """Return the providers that the API enables by default, in its order. An enrichment has none to choose."""
    if not isinstance(description, Waterfall):
        return []
    return [provider.id for provider in description.available_enrichments if provider.enabled_by_default]


def make_request_template(job: Job, description: Description, providers: Iterable[int]) -> RequestTemplate:
    """Check the job against the description. `providers` are used when the job names none.

    Raises JobError with the key and the nearest valid name.
    """
    model, kind = job.model, description.target.kind
    if problems := list(target_problems(job, description)):
        raise join_problems(problems)
    target = replace(model.target, id=description.identifier)
    if kind is TargetKind.WATERFALL:
        target = replace(target, enrichments=tuple(model.enrichments or providers))
        if not target.enrichments:
            hint = "set `enrichments`"
            raise job.error(["waterfall"], "the API enables none of its providers by default", hint)
    columns = model.columns or {field.name: field.name for field in description.output_fields}
    if not columns:
        raise job.error([kind.value], "the API lists no output fields for it", "set `columns`")
    unit_price, priced_by = description.highest_price(target), description.priced_by
    required = [param.name for param in description.input_params if param.required]
    if priced_by is not None:
        constant = model.params[priced_by].value if priced_by in model.params else None
        if unit_price is not None and constant is not None and is_count(constant):
            unit_price, priced_by = unit_price * int(constant), None
        elif priced_by in model.params and priced_by not in required:
            required.append(priced_by)  # without it the price of the row has no limit
    return RequestTemplate(
        target=target,
        required_params=tuple(required),
        email_params=tuple(p.name for p in description.input_params if p.type == "email" or p.name == "email"),
        columns=columns,
        unit_price=unit_price,
        priced_by=priced_by,
        choices={param.name: spellings for param in description.input_params if (spellings := spellings_of(param))},
        source=None if isinstance(description, Waterfall) else description.source,
    )


def join_templates(templates: Sequence[RequestTemplate]) -> RequestTemplate:
    """Return a template with the columns of all steps. The rest is that of the first step."""
    columns: dict[str, str] = {}
    for template in templates:
        columns |= {name: path for name, path in template.columns.items() if name not in columns}
    return replace(templates[0], columns=columns)
