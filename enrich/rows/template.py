"""Makes the request template of a job, and checks the names in the job by the API's description of its target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from enrich.databar.description import DOCUMENTED_WATERFALLS, Description, Enrichment, Param, Provider, Waterfall
from enrich.errors import JobError, closest_name, did_you_mean, suggest_name
from enrich.job.job import Job
from enrich.job.target import Target, TargetKind
from enrich.models import parse_count

#: What an answer has beside its result, in columns that begin with `$`.
BESIDE_RESULT = ("is_verified", "steps", "enrichment_data")
_WRAPPER_KEYS = (*BESIDE_RESULT, "result", "result_field")
#: A number that multiplies a price must be below this.
MAX_COUNT = 1_000_000


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
    """Return the template of a target that the API has not described yet.

    The documented params are required, as far as the job has them.
    """
    documented = DOCUMENTED_WATERFALLS.get(job.model.waterfall or "")
    names = () if documented is None else (param.name for param in documented.input_params)
    required = tuple(name for name in names if name in job.model.params)
    return RequestTemplate(job.model.target, required, (), job.model.columns or {}, None)


def default_providers(description: Description) -> list[int]:
    """Return the providers that the API enables by default, in its order. An enrichment has none to choose."""
    if not isinstance(description, Waterfall):
        return []
    return [provider.id for provider in description.available_enrichments if provider.enabled_by_default]


def make_request_template(job: Job, description: Description, providers: Iterable[int]) -> RequestTemplate:
    """Check the job against the description. `providers` are used when the job names none. Raises JobError."""
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


def name_problems(
    job: Job, description: Description, last_known: Description | None = None, answered: frozenset[str] = frozenset()
) -> list[JobError]:
    """Return an error for each wrong name, with its line and the nearest name. One cause is one error.

    `last_known` is the description of an earlier run, `answered` has the fields of the job that answers have. An empty
    list of the description checks nothing.
    """
    return [
        *target_problems(job, description),
        *_column_problems(job, description, last_known, answered),
        *_limit_problems(job, description),
    ]


def target_problems(job: Job, description: Description) -> Iterator[JobError]:
    """Yield an error for each param, provider, verifier and number of pages that the description does not allow."""
    yield from _param_problems(job, description)
    yield from _value_problems(job, description)
    yield from _provider_problems(job, description)
    yield from _verifier_problems(job, description)
    if job.model.pagination is not None and description.is_paginated is False:
        yield job.error(["pagination"], f"{description.target.label} has no pages", "remove it")


def join_problems(problems: Sequence[JobError]) -> JobError:
    """Combine the errors into one, a line each. A single error has its hint as a separate text."""
    if len(problems) == 1:
        return problems[0]
    return JobError("\n".join(f"{each.message}, {each.hint}" if each.hint else each.message for each in problems))


def column_fields(job: Job) -> frozenset[str]:
    """Return the fields of an answer that the job's columns read: the first part of each path, and each whole path."""
    paths = [path.removeprefix("$") for path in (job.model.columns or {}).values()]
    return frozenset(paths) | {path.partition(".")[0] for path in paths}


def _param_problems(job: Job, description: Description) -> Iterator[JobError]:
    params, known = job.model.params, [param.name for param in description.input_params]
    missing = [param.name for param in description.input_params if param.required and param.name not in params]
    unknown = [name for name in params if name not in known] if known else []
    for name in unknown:
        # A misspelled param is also a missing one: that is one error.
        suggestion = closest_name(name, missing) or (missing[0] if len(unknown) == len(missing) == 1 else None)
        if suggestion is not None:
            missing.remove(suggestion)
        hint = suggest_name(name, known) if suggestion is None else did_you_mean(suggestion)
        yield job.error(["params", name], f"{description.target.label} has no param with this name", hint)
    for name in missing:
        message = f"{description.target.label} requires `{name}`"
        yield job.error(["params"], message, f"map it: {name}: <a column of the input>")


def is_count(text: str) -> bool:
    """Check whether a text is a whole number above 0 that a price can be multiplied by."""
    return 0 < (parse_count(text) or 0) < MAX_COUNT


def spellings_of(param: Param) -> dict[str, str]:
    """Return the values that a param may have, by their spellings in lower case: ids, and names that are unique.

    Empty: any value. A param with several values at once is not checked.
    """
    if param.type == "mselect":
        return {}
    names = {choice.name.casefold(): choice.id for choice in reversed(param.choices)}
    return {name: id_ for name, id_ in names.items() if name} | {
        choice.id.casefold(): choice.id for choice in param.choices
    }


def _value_problems(job: Job, description: Description) -> Iterator[JobError]:
    """Yield an error for each constant that the param cannot have, and for a missing param that makes the price."""
    params, priced_by = job.model.params, description.priced_by
    for offered in description.input_params:
        value = params[offered.name].value if offered.name in params else None
        spellings = spellings_of(offered)
        if value is not None and spellings and value.casefold() not in spellings:
            hint = suggest_name(value, [choice.id for choice in offered.choices])
            yield job.error(["params", offered.name], f"{description.target.label} has no choice `{value}`", hint)
    if priced_by is None:
        return
    if priced_by not in params:
        message = f"the price of {description.target.label} depends on `{priced_by}`"
        if priced_by not in [param.name for param in description.input_params if param.required]:
            yield job.error(["params"], message, f'map it: {priced_by}: {{value: "10"}}, or a column of the input')
    elif (value := params[priced_by].value) is not None and not is_count(value):
        message = f"multiplies the price, and `{value}` is not a whole number above 0"
        yield job.error(["params", priced_by], message)


def _limit_problems(job: Job, description: Description) -> Iterator[JobError]:
    """Yield an error for a price that grows with a param or pages where `max_credits` is missing or not enforceable."""
    if not (description.priced_by or description.is_paginated or job.model.pagination):
        return
    unit = f"with `{description.priced_by}`" if description.priced_by else "with each page"
    label = description.target.label
    if description.highest_price(job.model.target) is None:
        message = f"the price of {label} grows {unit}, and the API does not give it: the cost cannot be limited"
        yield job.error(["enrichment"], message)
    elif job.max_credits is None and job.step_max_credits is None:
        message = f"the price of {label} grows {unit}, so `max_credits` is required"
        yield job.error(["limits", "max_credits"], message, "limits: {max_credits: 100}, or --max-credits 100")


def _provider_problems(job: Job, description: Description) -> Iterator[JobError]:
    named, available = job.model.enrichments or [], description.available_enrichments
    for index, number in enumerate(named):
        if available and number not in [provider.id for provider in available]:
            message = f"`{description.identifier}` has no provider {number}"
            yield job.error(["enrichments", index], message, _numbers_hint(number, available))
        elif number in named[:index]:
            yield job.error(["enrichments", index], f"provider {number} is set twice", "remove one of the two")


def _verifier_problems(job: Job, description: Description) -> Iterator[JobError]:
    number, available = job.model.email_verifier, description.email_verifiers
    if number is None:
        return
    if not description.is_email_verifying:
        message = f"{description.target.label} verifies no e-mails"
        yield job.error(["email_verifier"], message, "remove it")
    elif available and number not in [verifier.id for verifier in available]:
        message = f"`{description.identifier}` has no verifier {number}"
        yield job.error(["email_verifier"], message, _numbers_hint(number, available))


def _numbers_hint(number: int, available: Sequence[Provider]) -> str:
    names = {str(each.id): f"{each.id} {each.name}".rstrip() for each in available}
    closest = closest_name(str(number), names)
    suggestion = "" if closest is None else f"did you mean {names[closest]}? "
    return f"{suggestion}it has {', '.join(names.values())}"


def _column_problems(
    job: Job, description: Description, last_known: Description | None, answered: frozenset[str]
) -> Iterator[JobError]:
    listed = [field.name for field in description.output_fields]
    if not listed:
        return
    listed += [field.name for field in last_known.output_fields if field.name not in listed] if last_known else []
    fields = {*listed, *answered}
    # A path into a list of rows begins with the row's number. Only an answer shows whether it is a list.
    may_be_list = isinstance(description, Enrichment)
    for name, path in (job.model.columns or {}).items():
        beside = path.startswith("$")
        names = fields | set(_WRAPPER_KEYS) if beside else fields
        field = path.removeprefix("$")
        first, _, rest = field.partition(".")
        if may_be_list and parse_count(first) is not None:
            first, _, rest = rest.partition(".")
        if field in names or first in names:
            continue
        candidates = [f"${each}" for each in (*BESIDE_RESULT, *listed)] if beside else listed
        hint = suggest_name(f"${first}" if beside else first, candidates)
        hint = hint or f"`enrich {description.target.kind}s {description.identifier}` lists them"
        message = f"{description.target.label} has no field `{path}`"
        yield job.error(["columns", name], message, hint)
