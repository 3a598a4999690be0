"""Finds the requests about a person along the steps of a job: what one step found is what a later one has sent."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from enrich.databar.task_results import column_values, is_blank
from enrich.errors import EnrichError
from enrich.files.values import text_frame
from enrich.job.cell_text import fold
from enrich.job.job import Job
from enrich.job.target import Param
from enrich.json_text import parse_json
from enrich.ledger import erasure
from enrich.ledger.database import Database
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.preflight import find_template, steps_from_ledger
from enrich.run.step_rows import StepRows


class RowRequests(NamedTuple):
    """The requests of rows: those of the person alone (fingerprint to params as JSON), and those of other rows.

    A request that another row has, too, such as one about a company, is not about this person alone.
    """

    own: dict[bytes, str]
    of_others: Collection[bytes]


#: The columns of each step, with their paths.
Columns: TypeAlias = Sequence[Mapping[str, str]]


def requests_of_rows(
    job_input: JobInput, template: RequestTemplate, ledger: Database, criteria: Mapping[str, str]
) -> RowRequests:
    """Return the requests by whether a row with them matches. Empty if the table has no such columns.

    Without steps all requests of the person's rows are the person's own.
    """
    job = job_input.job
    tables = ((text_frame(batch.frame), [batch]) for batch in job_input.batches(template))
    if job.step_jobs:
        try:
            rows = StepRows(job_input, ledger, steps_from_ledger(ledger, job, job_input))
        except EnrichError:
            return RowRequests({}, ())
        tables = ((table.text, [step.built for step, _ in table.steps]) for table in rows.step_tables())
    own: dict[bytes, str] = {}
    of_others: set[bytes] = set()
    for text, batches in tables:
        if not set(criteria) <= set(text.columns):
            return RowRequests({}, ())
        for row, cells in enumerate(text[:, list(criteria)].iter_rows()):
            is_person = all(fold(cell) == value for cell, value in zip(cells, criteria.values(), strict=True))
            for fingerprint, params in ((batch.fingerprints[row], batch.params[row]) for batch in batches):
                if fingerprint is None or params is None:
                    continue
                if is_person:
                    own[fingerprint] = params
                elif job.step_jobs:
                    of_others.add(fingerprint)
    return RowRequests({name: params for name, params in own.items() if name not in of_others}, of_others)


def follow_answers(
    job: Job, ledger: Database, found: Sequence[dict[str, Any]], of_others: Collection[bytes]
) -> list[dict[str, Any]]:
    """Return the requests found, and those that sent what the answers of these have found, step after step.

    An e-mail address identifies a person, and so does a link that was found for an address. Another link may be that of
    a company: it is followed only where it was found for this person alone, and not to a request `of_others`, nor to
    one with another person's cells.
    """
    known = list(map(dict, erasure.requests_with_answers(ledger)))
    columns = [find_template(ledger, step)[0].columns for step in job.step_jobs]
    chosen = {request["id"]: request for request in found}
    params = [item for step in job.step_jobs for item in step.model.params.items()]
    of_one_column = [(name, param) for name, param in params if len(param.columns) == 1]
    waiting = list(found)
    while waiting:
        identifying, links = _values_to_follow(columns, params, waiting)
        if links:
            rest = (request for request in known if request["id"] not in chosen)
            links -= {pair for request in rest for pair in _found_values(columns, request)}
        cells: dict[str, set[str]] = {}
        for column, value in (pair for request in chosen.values() for pair in _sent_cells(of_one_column, request)):
            cells.setdefault(column, set()).add(value)
        waiting = []
        for request in known:
            sent = set() if request["id"] in chosen else _sent_cells(params, request)
            is_person = not sent.isdisjoint(identifying)
            if not is_person and not sent.isdisjoint(links) and request["fingerprint"] not in of_others:
                others = _sent_cells(of_one_column, request) - links
                is_person = all(value in cells.get(column, {value}) for column, value in others)
            if is_person:
                waiting.append(request)
        chosen |= {request["id"]: request for request in waiting}
    return list(chosen.values())


def _values_to_follow(
    columns: Columns, params: Sequence[tuple[str, Param]], requests: Sequence[Mapping[str, Any]]
) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Return the values that identify a person in the answers of requests, and links that may not, by column."""
    identifying: set[tuple[str, str]] = set()
    links: set[tuple[str, str]] = set()
    for request in requests:
        by_address = any(_is_address(value) for _, value in _sent_cells(params, request))
        for pair in _found_values(columns, request):
            if "/" in pair[1]:
                (identifying if by_address else links).add(pair)
            elif _is_address(pair[1]):
                identifying.add(pair)
    return identifying, links


def _is_address(value: str) -> bool:
    return "@" in value and "/" not in value


def _sent_cells(params: Sequence[tuple[str, Param]], request: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return the values that a request has sent, with each column from which they may be."""
    values = json.loads(request["params"])
    return {(column, fold(values[name])) for name, param in params if name in values for column in param.columns}


def _found_values(columns: Columns, request: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the values of the steps' columns in the answers of a request, by column."""
    for answer in filter(None, json.loads(request["answers"])):
        data = parse_json(answer).get("data")
        for of_step in columns:
            for name, value in zip(of_step, column_values(data, of_step.values()), strict=True):
                if not is_blank(value):
                    yield name, fold(str(value))
