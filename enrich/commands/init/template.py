"""Writes a new job file: the matched columns with their confidence, and the optional keys as comments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from enrich.commands.init.column_matching import (
    ColumnMatch,
    existing_result_columns,
    match_columns,
    result_column_names,
    unmatched_reason,
)
from enrich.commands.init.sample import Sample
from enrich.databar.waterfall import Waterfall
from enrich.rows.requests import STATUS_COLUMNS

#: Placeholder for a missing column. `enrich check` reports it.
PLACEHOLDER = "FILL THIS IN"


@dataclass(frozen=True, slots=True)
class JobDraft:
    """The content of a job file. `source` is the origin and date of the waterfall's description.

    `schema` is the path of the JSON Schema relative to the job file, None if there is none.
    """

    sample: Sample
    waterfall: Waterfall
    source: str
    input: str
    output: str
    schema: str | None = None


def render_job_file(draft: JobDraft) -> str:
    """Return the text of the job file. Guesses and missing columns are marked as such."""
    return "\n".join(_job_lines(draft)) + "\n"


def _job_lines(draft: JobDraft) -> Iterator[str]:
    waterfall = draft.waterfall
    if draft.schema:
        yield f"# yaml-language-server: $schema={draft.schema}"
    yield f"# {_printable(waterfall.name or waterfall.identifier)}: {_printable(draft.input)}"
    rows_read = f"{draft.sample.rows:,} {'row' if draft.sample.rows == 1 else 'rows'}"
    yield f"# Written by `enrich init` from {rows_read}. Read the guesses, then: enrich check"
    yield f"# The waterfall's params and fields are those of {draft.source}."
    yield "version: 1"
    yield from _input_lines(draft)
    yield f"output: {yaml_scalar(draft.output)} # strftime codes are allowed: leads-%Y-%m-%d.csv"
    yield ""
    yield f"waterfall: {yaml_scalar(waterfall.identifier)}"
    yield from _provider_lines(waterfall)
    yield ""
    yield from _param_lines(waterfall, draft.sample)
    yield ""
    yield from _column_lines(waterfall, draft.sample.header)
    yield ""
    yield from _optional_key_lines(waterfall, draft.sample)


def _input_lines(draft: JobDraft) -> Iterator[str]:
    source = draft.sample.format
    if (source.separator, source.encoding) == (",", "utf-8"):
        yield f"input: {yaml_scalar(draft.input)}"
        return
    csv_options = f"separator: {_quote(source.separator)}, encoding: {source.encoding}"
    yield f"input: {{path: {yaml_scalar(draft.input)}, {csv_options}}} # guessed from the file"


def _provider_lines(waterfall: Waterfall) -> Iterator[str]:
    providers = waterfall.available_enrichments
    if providers:
        defaults = ", ".join(str(each.id) for each in providers if each.enabled_by_default)
        yield f"# enrichments: [{defaults}] # who is asked, in this order"
        for each in providers:
            price = "price not known" if each.price is None else f"{each.price} credits"
            more = "" if each.enabled_by_default else ", only when named"
            yield f"#   {each.id} {_printable(each.name)}: {price}{more}"
    else:
        yield "# enrichments: [833, 966] # who is asked, in this order; `enrich waterfalls` tells their numbers"
    if waterfall.is_email_verifying:
        verifiers = [f"{each.id} {each.name} {each.price}" for each in waterfall.email_verifiers]
        first = waterfall.email_verifiers[0].id if waterfall.email_verifiers else 10
        yield f"# email_verifier: {first} # checks what was found, at a price{': ' if verifiers else ''}" + _printable(
            ", ".join(verifiers)
        )


def _param_lines(waterfall: Waterfall, sample: Sample) -> Iterator[str]:
    names = [param.name for param in waterfall.input_params]
    # Required params get their columns first.
    ordered = sorted(waterfall.input_params, key=lambda param: not param.required)
    matches = match_columns([param.name for param in ordered], sample.columns)
    yield "params: # the waterfall's params: columns of the input"
    if not names:
        yield (
            f"  name_of_a_param: {yaml_scalar(PLACEHOLDER)} # the waterfall names no params: look at its documentation"
        )
    for param in ordered:
        match = matches[param.name]
        if match is not None:
            yield (
                f"  {yaml_scalar(param.name)}: {_param_source(match)} # {match.confidence}: {_printable(match.reason)}"
            )
        elif param.required:
            why = unmatched_reason(param.name, sample.columns) or "no column looks like it"
            yield (
                f"  {yaml_scalar(param.name)}: {yaml_scalar(PLACEHOLDER)} "
                f"# REQUIRED: {_printable(why)}; put a column's name here"
            )
        else:
            yield f"  # {yaml_scalar(param.name)}: a column # optional: no column looks like it"


def _param_source(match: ColumnMatch) -> str:
    if len(match.columns) == 1 and not match.transform:
        return yaml_scalar(match.columns[0])
    columns = [yaml_scalar(column) for column in match.columns]
    column = columns[0] if len(columns) == 1 else f"[{', '.join(columns)}]"
    return f"{{column: {column}, transform: [{', '.join(match.transform)}]}}"


def _column_lines(waterfall: Waterfall, header: Sequence[str]) -> Iterator[str]:
    fields = [field.name for field in waterfall.output_fields]
    if not fields:
        yield "# columns: # new column: field of the result; without it, all fields that the API names"
        yield "#   new_column: field"
        return
    yield "columns: # new column: field of the result"
    for name, field in result_column_names(fields, [*header, *STATUS_COLUMNS]):
        yield f"  {yaml_scalar(name)}: {yaml_scalar(field)}"


def _optional_key_lines(waterfall: Waterfall, sample: Sample) -> Iterator[str]:
    header = sample.header
    existing = existing_result_columns([field.name for field in waterfall.output_fields], sample.columns)
    example = yaml_scalar((existing or header)[0])
    number = yaml_scalar(
        next((each.name for each in sample.columns if each.numeric_share == 1 and each.filled_count), header[0])
    )
    group = yaml_scalar(([param.name for param in waterfall.input_params if param.required] or header)[-1])
    where = yaml_scalar("\"{}\" <> ''".format(header[0].replace('"', '""')))
    yield "# More that a job may say; take the # away to use it."
    yield "# merge: fill_empty # let columns of the job be columns of the input, and fill their blanks (or: overwrite)"
    yield f"# only_if_empty: [{example}] # ask only for rows where this is blank"
    yield f"# where: {where} # ask only for these rows: polars SQL, cells are text"
    yield f"# order_by: {number} # ask the rows with the largest values first"
    yield f"# caps: {{by: {group}, max: 3}} # ask at most so many leads with the same value"
    yield "# canary: {rows: 50, min_hit_rate: 0.2} # judge the first answers before the others are sent"
    yield "# suppress: do-not-ask.txt # addresses and domains that are never sent, one a line"
    yield "# dispatch: {bulk: 100} # so many requests as one task: fewer calls, but no price and no error of each row"
    yield "# rejects: rejects.csv # the rows that are invalid, failed or expired, with the reason"
    yield "# changes: changes-%Y-%m-%dT%H%M%S.csv # what is new since the last run"
    yield "# report: report.html # what every night got, what it cost and who earned it, to look at"
    yield "# metrics: enrich.prom # for the textfile collector of Prometheus"
    yield "# healthcheck: https://monitor.example/ping/my-job # is told of start, success and failure"
    yield "# notify: notify.txt # addresses that are told when something needs a person"
    yield "# limits:"
    yield "#   max_credits: 100 # what one run may spend; without it there is no cap"
    yield "#   min_balance: 50 # what stays in the account"
    yield "#   requests_per_second: 20 # at most; without it, what the API allows"
    yield "# policy:"
    yield "#   refresh: {found: 90d, not_found: 14d} # older answers are asked again, at a price; default: never"


def yaml_scalar(text: str) -> str:
    """Format a text as a YAML scalar, quoted if necessary."""
    plain = bool(text) and all(sign.isalnum() or sign in " _-./" for sign in text) and text[0] not in " -/"
    if plain and text.isprintable() and text == text.strip():
        try:
            if yaml.safe_load(f"[{text}]") == [text]:
                return text
        except (yaml.YAMLError, ValueError):
            pass
    return _quote(text)


def _quote(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True).removesuffix("\n")


def _printable(text: str) -> str:
    """Replace unprintable characters by `?`, so that a comment stays on one line."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
