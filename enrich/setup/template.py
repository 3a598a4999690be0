"""Writes a new job file: what was guessed, how sure it is, and what else a job may say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from enrich.api.waterfall import Waterfall
from enrich.asking import STATUS_COLUMNS
from enrich.setup.guess import Guess, already_known, guess, new_names, unmatched
from enrich.setup.sample import Sample

#: Stands where a column is missing; `enrich check` knows it.
PLACEHOLDER = "FILL THIS IN"


@dataclass(frozen=True, slots=True)
class Draft:
    """What a job file is written from. `source` says where the waterfall's description comes from, and of what date;
    `schema` names the JSON Schema, relative to the job file, None: there is none.
    """  # noqa: D205 - one thought

    sample: Sample
    waterfall: Waterfall
    source: str
    input: str
    output: str
    schema: str | None = None


def write_job(draft: Draft) -> str:
    """Write the job file. What was guessed is marked; what is missing is marked as missing."""
    return "\n".join(_lines(draft)) + "\n"


def _lines(draft: Draft) -> Iterator[str]:
    waterfall = draft.waterfall
    if draft.schema:
        yield f"# yaml-language-server: $schema={draft.schema}"
    yield f"# {_comment(waterfall.name or waterfall.identifier)}: {_comment(draft.input)}"
    looked = f"{draft.sample.rows:,} {'row' if draft.sample.rows == 1 else 'rows'}"
    yield f"# Written by `enrich init` from {looked}. Read the guesses, then: enrich check"
    yield f"# The waterfall's params and fields are those of {draft.source}."
    yield "version: 1"
    yield from _input(draft)
    yield f"output: {scalar(draft.output)} # strftime codes are allowed: leads-%Y-%m-%d.csv"
    yield ""
    yield f"waterfall: {scalar(waterfall.identifier)}"
    yield from _providers(waterfall)
    yield ""
    yield from _params(waterfall, draft.sample)
    yield ""
    yield from _columns(waterfall, draft.sample.header)
    yield ""
    yield from _more(waterfall, draft.sample)


def _input(draft: Draft) -> Iterator[str]:
    source = draft.sample.format
    if (source.separator, source.encoding) == (",", "utf-8"):
        yield f"input: {scalar(draft.input)}"
        return
    more = f"separator: {_quoted(source.separator)}, encoding: {source.encoding}"
    yield f"input: {{path: {scalar(draft.input)}, {more}}} # guessed from the file"


def _providers(waterfall: Waterfall) -> Iterator[str]:
    offered = waterfall.available_enrichments
    if offered:
        named = ", ".join(str(each.id) for each in offered if each.enabled_by_default)
        yield f"# enrichments: [{named}] # who is asked, in this order"
        for each in offered:
            price = "price not known" if each.price is None else f"{each.price} credits"
            more = "" if each.enabled_by_default else ", only when named"
            yield f"#   {each.id} {_comment(each.name)}: {price}{more}"
    else:
        yield "# enrichments: [833, 966] # who is asked, in this order; `enrich waterfalls` tells their numbers"
    if waterfall.is_email_verifying:
        verifiers = [f"{each.id} {each.name} {each.price}" for each in waterfall.email_verifiers]
        first = waterfall.email_verifiers[0].id if waterfall.email_verifiers else 10
        yield f"# email_verifier: {first} # checks what was found, at a price{': ' if verifiers else ''}" + _comment(
            ", ".join(verifiers)
        )


def _params(waterfall: Waterfall, sample: Sample) -> Iterator[str]:
    names = [param.name for param in waterfall.input_params]
    # The required ones choose first.
    ordered = sorted(waterfall.input_params, key=lambda param: not param.required)
    found = guess([param.name for param in ordered], sample.columns)
    yield "params: # the waterfall's params: columns of the input"
    if not names:
        yield f"  name_of_a_param: {scalar(PLACEHOLDER)} # the waterfall names no params: look at its documentation"
    for param in ordered:
        chosen = found[param.name]
        if chosen is not None:
            yield f"  {scalar(param.name)}: {_source(chosen)} # {chosen.sure}: {_comment(chosen.why)}"
        elif param.required:
            why = unmatched(param.name, sample.columns) or "no column looks like it"
            yield f"  {scalar(param.name)}: {scalar(PLACEHOLDER)} # REQUIRED: {_comment(why)}; put a column's name here"
        else:
            yield f"  # {scalar(param.name)}: a column # optional: no column looks like it"


def _source(chosen: Guess) -> str:
    if len(chosen.columns) == 1 and not chosen.transform:
        return scalar(chosen.columns[0])
    columns = [scalar(column) for column in chosen.columns]
    column = columns[0] if len(columns) == 1 else f"[{', '.join(columns)}]"
    return f"{{column: {column}, transform: [{', '.join(chosen.transform)}]}}"


def _columns(waterfall: Waterfall, header: Sequence[str]) -> Iterator[str]:
    fields = [field.name for field in waterfall.output_fields]
    if not fields:
        yield "# columns: # new column: field of the result; without it, all fields that the API names"
        yield "#   new_column: field"
        return
    yield "columns: # new column: field of the result"
    for name, field in new_names(fields, [*header, *STATUS_COLUMNS]):
        yield f"  {scalar(name)}: {scalar(field)}"


def _more(waterfall: Waterfall, sample: Sample) -> Iterator[str]:
    header = sample.header
    known = already_known([field.name for field in waterfall.output_fields], sample.columns)
    example = scalar((known or header)[0])
    number = scalar(next((each.name for each in sample.columns if each.numeric == 1 and each.filled), header[0]))
    group = scalar(([param.name for param in waterfall.input_params if param.required] or header)[-1])
    where = scalar("\"{}\" <> ''".format(header[0].replace('"', '""')))
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


def scalar(text: str) -> str:
    """Write a text as YAML, with quotes where it needs them."""
    plain = bool(text) and all(sign.isalnum() or sign in " _-./" for sign in text) and text[0] not in " -/"
    if plain and text.isprintable() and text == text.strip():
        try:
            if yaml.safe_load(f"[{text}]") == [text]:
                return text
        except (yaml.YAMLError, ValueError):
            pass
    return _quoted(text)


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True).removesuffix("\n")


def _comment(text: str) -> str:
    """Keep a comment on its line."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
