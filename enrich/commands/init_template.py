"""Writes a new job file: the matched columns with their confidence, and the optional keys as comments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from enrich.commands.init_columns import (
    Column,
    ColumnMatch,
    existing_result_columns,
    match_columns,
    result_column_names,
    unmatched_reason,
)
from enrich.databar.description import Description, Enrichment, Param, Waterfall, format_price
from enrich.errors import printable
from enrich.files.text import TableFile
from enrich.job.document import yaml_scalar
from enrich.job.target import UNFILLED_COLUMN
from enrich.models import pluralize
from enrich.rows.batches import STATUS_COLUMNS

#: The cap of a new job whose price has no limit.
REQUIRED_CREDITS = 100


class Sample(Struct, frozen=True):
    """The format of a table, and its columns as seen in the first `rows` rows."""

    format: TableFile
    columns: list[Column]
    rows: int

    @property
    def header(self) -> list[str]:
        """The column names."""
        return [column.name for column in self.columns]


class JobDraft(Struct, frozen=True):
    """The content of a job file. `source` is the origin of the description, `schema` the path of the JSON Schema."""

    sample: Sample
    description: Description
    source: str
    input: str
    output: str
    schema: str | None = None


def render_job_file(draft: JobDraft) -> str:
    """Return the text of the job file. Guesses and missing columns are marked as such."""
    return "\n".join(_job_lines(draft)) + "\n"


def _job_lines(draft: JobDraft) -> Iterator[str]:
    described = draft.description
    if draft.schema:
        yield f"# yaml-language-server: $schema={draft.schema}"
    yield f"# {printable(described.name or described.identifier)}: {printable(draft.input)}"
    rows_read = pluralize(draft.sample.rows, "row")
    yield f"# Written by `enrich init` from {rows_read}. Check the matched columns."
    yield f"# Params and fields of the {described.target.kind} are from {draft.source}."
    yield "version: 1"
    yield from _input_lines(draft)
    output = yaml_scalar(draft.output)
    if draft.sample.format.encoding == "utf-8-sig":
        output = f"{{path: {output}, encoding: utf-8-sig}} # with a byte order mark, like the input;"
        yield f"output: {output} strftime codes are allowed: leads-%Y-%m-%d.csv"
    else:
        yield f"output: {output} # strftime codes are allowed: leads-%Y-%m-%d.csv"
    yield ""
    if isinstance(described, Enrichment):
        yield f"enrichment: {described.id} # {printable(described.price_text)}"
        if described.is_paginated:
            yield "pagination: {pages: 1} # how many pages of the result"
    else:
        yield f"waterfall: {yaml_scalar(described.identifier)}"
        yield from _provider_lines(described)
    yield ""
    yield from _param_lines(described, draft.sample)
    yield ""
    yield from _column_lines(described, draft.sample.header)
    yield ""
    if described.priced_by or described.is_paginated:
        yield f"limits: {{max_credits: {REQUIRED_CREDITS}}} # required: the price has no other limit"
        yield ""
    yield from _optional_key_lines(described, draft.sample)


def _input_lines(draft: JobDraft) -> Iterator[str]:
    source = draft.sample.format
    if source.sheet is not None:
        yield f"input: {{path: {yaml_scalar(draft.input)}, sheet: {yaml_scalar(source.sheet)}}}"
        return
    encoding = source.encoding.removesuffix("-sig")  # the mark is read without it
    if (source.separator, encoding) == (",", "utf-8"):
        yield f"input: {yaml_scalar(draft.input)}"
        return
    csv_options = f"separator: {yaml_scalar(source.separator)}, encoding: {encoding}"
    doubt = "; if letters are wrong, name it with --encoding" if encoding == "cp1252" else ""
    yield f"input: {{path: {yaml_scalar(draft.input)}, {csv_options}}} # guessed from the file{doubt}"


def _provider_lines(waterfall: Waterfall) -> Iterator[str]:
    providers = waterfall.available_enrichments
    if providers:
        defaults = ", ".join(str(each.id) for each in providers if each.enabled_by_default)
        yield f"# enrichments: [{defaults}] # providers, in this order"
        for each in providers:
            more = "" if each.enabled_by_default else ", optional"
            yield f"#   {each.id} {printable(each.name)}: {format_price(each.price)}{more}"
    else:
        yield "# enrichments: [833, 966] # providers, in this order; `enrich waterfalls ID` lists their numbers"
    if waterfall.is_email_verifying:
        verifiers = [f"{each.id} {each.name} {each.price}" for each in waterfall.email_verifiers]
        first = waterfall.email_verifiers[0].id if waterfall.email_verifiers else 10
        yield f"# email_verifier: {first} # verifies each match, at a price{': ' if verifiers else ''}" + printable(
            ", ".join(verifiers)
        )


def _param_lines(described: Description, sample: Sample) -> Iterator[str]:
    # Required params get their columns first.
    ordered = sorted(described.input_params, key=lambda param: not param.required)
    matches = match_columns([param.name for param in ordered], sample.columns)
    yield f"params: # the {described.target.kind}'s params: columns of the input"
    if not ordered:
        yield f"  name_of_a_param: {yaml_scalar(UNFILLED_COLUMN)} # params unknown: see the documentation"
    for param in ordered:
        match = matches[param.name]
        if match is not None:
            remark = f"{match.reason}; filled in {_fill_text(match, sample.rows)}"
            source = _param_source(match)
            yield f"  {yaml_scalar(param.name)}: {source} # {match.confidence}: {printable(remark)}{_choices(param)}"
        elif param.required:
            why = unmatched_reason(param.name, sample.columns) or "no matching column"
            yield (
                f"  {yaml_scalar(param.name)}: {yaml_scalar(UNFILLED_COLUMN)} "
                f"# REQUIRED: {printable(why)}; write a column's name here{_choices(param)}"
            )
        else:
            yield f"  # {yaml_scalar(param.name)}: a column # optional: no matching column{_choices(param)}"


def _choices(param: Param) -> str:
    """Return the values that a param may have, as the end of a comment."""
    return f"; one of: {printable(', '.join(choice.id for choice in param.choices))}" if param.choices else ""


def _fill_text(match: ColumnMatch, rows: int) -> str:
    """Return how many of the rows that were looked at each column fills."""
    if len(match.columns) == 1:
        return f"{match.filled[0]:,} of {rows:,}"
    counts = (f"{count:,} ({column})" for column, count in zip(match.columns, match.filled, strict=True))
    return f"{', '.join(counts)} of {rows:,}"


def _param_source(match: ColumnMatch) -> str:
    if len(match.columns) == 1 and not match.transform:
        return yaml_scalar(match.columns[0])
    columns = [yaml_scalar(column) for column in match.columns]
    column = columns[0] if len(columns) == 1 else f"[{', '.join(columns)}]"
    return f"{{column: {column}, transform: [{', '.join(match.transform)}]}}"


def _column_lines(described: Description, header: Sequence[str]) -> Iterator[str]:
    fields = [field.name for field in described.output_fields]
    if not fields:
        yield "# columns: # new column: field of the result; default: all fields of the API"
        yield "#   new_column: field"
        return
    yield "columns: # new column: field of the result"
    for name, field in result_column_names(fields, [*header, *STATUS_COLUMNS]):
        yield f"  {yaml_scalar(name)}: {yaml_scalar(field)}"


def _optional_key_lines(described: Description, sample: Sample) -> Iterator[str]:
    header = sample.header
    existing = existing_result_columns([field.name for field in described.output_fields], sample.columns)
    example = yaml_scalar((existing or header)[0])
    number = yaml_scalar(
        next((each.name for each in sample.columns if each.numeric_share == 1 and each.filled_count), header[0])
    )
    group = yaml_scalar(([param.name for param in described.input_params if param.required] or header)[-1])
    where = yaml_scalar("\"{}\" <> ''".format(header[0].replace('"', '""')))
    yield "# Optional keys. Remove the # to use one."
    yield "# merge: fill_empty # write into existing columns of the input: fill blanks, or overwrite"
    yield f"# only_if_empty: [{example}] # send only rows where this is blank"
    yield f"# where: {where} # send only these rows: a polars SQL expression, cells are text"
    yield f"# order_by: {number} # send rows with the largest values first"
    yield f"# caps: {{by: {group}, max: 3}} # per-group limit: leads with the same value"
    yield "# canary: {rows: 50, min_hit_rate: 0.2} # check the first results before the others are sent"
    yield "# suppress: do-not-send.txt # addresses and domains that are never sent, one per line"
    yield "# dispatch: {bulk: 100} # requests per task: fewer calls, but no price and no error of each row"
    yield "# rejects: rejects.csv # skipped, failed and expired rows, with the reason"
    yield "# changes: changes-%Y-%m-%dT%H%M%S.csv # changes since the last run"
    yield "# report: report.html # HTML page: match rate, spend and provider performance of each run"
    yield "# metrics: enrich.prom # for the textfile collector of Prometheus"
    yield "# healthcheck: https://monitor.example/ping/my-job # pinged at start, success and failure"
    yield "# notify: notify.txt # addresses notified when action is required"
    yield "# limits:"
    yield "#   max_credits: 100 # cap of one run; default: none"
    yield "#   min_balance: 50 # balance that is kept"
    yield "#   requests_per_second: 20 # maximum; default: what the API allows"
    yield "# policy:"
    yield "#   refresh: {found: 90d, not_found: 14d} # send again after this time, at a price; default: never"
