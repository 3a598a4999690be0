"""`enrich forget` and `enrich purge`: erase one person, or old params and answers, from a ledger."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from enrich.commands import options
from enrich.databar.answers import is_blank, parse_data, value_at
from enrich.databar.clock import SystemClock
from enrich.errors import CommandRefused, EnrichError, JobError
from enrich.files.values import text_frame
from enrich.job.job import Job, suggest_name
from enrich.ledger.database import ledger_exists
from enrich.ledger.forgotten import read_or_make_key
from enrich.ledger.ledger import Ledger
from enrich.ledger.lock import open_exclusive
from enrich.ledger.rescue_file import find_rescue_files
from enrich.ledger.rescue_import import import_rescue_files, remove_imported_files
from enrich.models import OPEN_STATES
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.context import rescue_folders
from enrich.run.preflight import template_from_ledger

YES_OPTION = click.option("--yes", is_flag=True, help="Do not ask.")


def forget_person(job: Job, matches: Sequence[str], confirm: Callable[[int], bool]) -> int:
    """Erase every request about a person. Return the number of requests.

    `matches` are `NAME=VALUE` texts, combined with AND. Case and surrounding spaces are ignored. A request matches if
    an input row with this request matches, or if its params and answers match. A hash made with the ledger's key is
    kept, so that no request about this person is sent again. `confirm` gets the number of requests. If it returns
    False, nothing is erased and the result is 0. Raises JobError for a name that is neither in the input nor in the
    job, CommandRefused if a matching request is still running at Databar, and LedgerLocked.
    """
    criteria = dict(_parse_match(match) for match in matches)
    with _open_for_erasing(job) as ledger:
        template = template_from_ledger(ledger, job)
        matching = _matching_requests(job, template, criteria)
        found = [
            known
            for known in map(dict, ledger.requests_with_answers())
            if known["fingerprint"] in matching or _matches_person(known, job, template, criteria)
        ]
        waiting = sum(known["state"] in OPEN_STATES for known in found)
        if waiting:
            raise CommandRefused(
                f"{waiting} of them wait at the API for their answer", "enrich run collects them; then again"
            )
        if not found or not confirm(len(found)):
            return 0
        ledger.load_forgotten()  # raises if the key of earlier hashes is missing: a new key would not match them
        key = read_or_make_key(job.ledger)
        with ledger.transaction():
            # Purged requests have no params in the ledger, so prefer the params from the input.
            forgotten_rows = (
                (known["id"], known["fingerprint"], matching.get(known["fingerprint"], known["params"]))
                for known in found
            )
            ledger.forget(key, forgotten_rows, SystemClock().now_ms())
        return len(found)


def purge_answers(job: Job, older_than: timedelta) -> int:
    """Erase params and answers of requests settled longer ago. Return their number. Raises LedgerLocked."""
    now_ms = SystemClock().now_ms()
    with _open_for_erasing(job) as ledger, ledger.transaction():
        return ledger.purge(now_ms - int(older_than.total_seconds() * 1000), now_ms)


@contextmanager
def _open_for_erasing(job: Job) -> Iterator[Ledger]:
    """Lock and open the ledger so that erased data is also removed from its file. Raises CommandRefused."""
    folders = rescue_folders(job)
    if not ledger_exists(job.ledger):
        if isinstance(job.ledger, Path) and (leftovers := find_rescue_files(job.ledger, folders)):
            raise CommandRefused(
                f"{job.ledger}: there is no ledger, but {leftovers[0]} holds what it knew",
                "enrich run JOB --limit 0 takes that in; then the same command again",
            )
        raise CommandRefused(f"{job.ledger}: there is no ledger: this job has never run")
    with open_exclusive(job.ledger) as fence, closing(Ledger(job.ledger, fencing_token=fence)) as ledger:
        ledger.enable_secure_delete()
        with ledger.transaction():  # so that no rescue file with the data is left beside the ledger
            rescued = import_rescue_files(ledger, folders, job.name, SystemClock().now_ms())
        remove_imported_files(rescued)
        yield ledger
        if not ledger.discard_erased_data():
            raise CommandRefused(
                f"{job.ledger} is being read, by `enrich report` perhaps: what was erased is still in the file",
                "when that has ended, the same command again takes it out",
            )


def _parse_match(match: str) -> tuple[str, str]:
    name, equals, value = match.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise JobError(f"--match {match}: must be NAME=VALUE, such as Email=ada@engine.example")
    return name.strip(), _fold(value)


def _fold(value: str) -> str:
    return value.strip().casefold()


def _matching_requests(job: Job, template: RequestTemplate, criteria: Mapping[str, str]) -> dict[bytes, str]:
    """Return the requests of matching input rows: fingerprint to params (JSON). Empty if the input is unusable."""
    job_input = None
    try:
        job_input = JobInput(job)
    except EnrichError:
        columns: list[str] = []
    else:
        columns = job_input.columns
    known = [*columns, *job.model.params, *template.columns]
    known += [name for param in job.model.params.values() for name in param.columns]
    for name in criteria:
        if name not in known:
            hint = suggest_name(name, known)
            raise JobError(f"--match {name}=…: neither the input nor the job has a column `{name}`", hint)
    if job_input is None or not set(criteria) <= set(columns):
        return {}
    cell_indexes = {columns.index(name): value for name, value in criteria.items()}
    return {
        fingerprint: params
        for batch in job_input.batches(template)
        for cells, fingerprint, params in zip(
            text_frame(batch.frame).iter_rows(), batch.fingerprints, batch.params, strict=True
        )
        if fingerprint is not None
        and params is not None
        and all(_fold(str(cells[index])) == value for index, value in cell_indexes.items())
    }


def _matches_person(
    request: Mapping[str, Any], job: Job, template: RequestTemplate, criteria: Mapping[str, str]
) -> bool:
    """Check whether a request's params and answers match all criteria."""
    params = json.loads(request["params"])
    answers = [json.loads(answer) for answer in json.loads(request["answers"]) if answer]
    fields = [parse_data(answer.get("data")).fields for answer in answers]
    return bool(params or fields) and all(
        any(_fold(value) == text for value in _values_named(name, text, params, fields, job, template))
        for name, text in criteria.items()
    )


def _values_named(
    name: str, text: str, params: Mapping[str, str], fields: list[Any], job: Job, template: RequestTemplate
) -> Iterator[str]:
    """Yield a request's values for a name, which is a param, an input column of a param, or an output column."""
    for param, source in job.model.params.items():
        if param in params and (name == param or name in source.columns):
            yield params[param]
    for field in fields:
        if name in template.columns:
            yield str(value_at(field, template.columns[name]))
        elif "@" in text:  # an email address identifies a person in any field
            yield from (str(value) for value in field.values() if not is_blank(value))


def _confirmed(prompt: str, *, yes: bool) -> bool:
    """Ask for confirmation unless `yes` is set. Raises UsageError off a terminal."""
    if yes:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(f"{prompt} Off a terminal this needs --yes")
    click.echo(prompt, err=True)
    return click.confirm("Go on?", err=True)


def _echo_count(count: int, done: str, *, as_json: bool) -> None:
    click.echo(json.dumps({"exit_code": 0, "requests": count}) if as_json else f"{_count_text(count)} {done}")


def _count_text(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"


@click.command()
@options.job_options(ledger="Take", sandbox="Take the ledger of the sandbox.")
@click.option("--match", "matches", multiple=True, required=True, metavar="NAME=VALUE", help="Whom; all must hold.")
@YES_OPTION
@options.JSON_OPTION
def forget(job_options: options.JobOptions, matches: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Erase what the ledger of JOB holds of a person, who is never asked about again.

    NAME is a column of the input, a param or a new column. Outputs and backups are yours to erase.
    """
    job = job_options.load()
    count = forget_person(
        job, matches, lambda found: _confirmed(f"{_count_text(found)} will be erased for good.", yes=yes)
    )
    _echo_count(count, "forgotten", as_json=as_json)


@click.command()
@options.job_options(ledger="Take", sandbox="Take the ledger of the sandbox.")
@click.option("--older-than", callback=options.parse_seconds, required=True, metavar="90d", help="Settled longer ago.")
@YES_OPTION
@options.JSON_OPTION
def purge(job_options: options.JobOptions, older_than: float, yes: bool, as_json: bool) -> None:
    """Drop old params and answers from the ledger of JOB; that they were paid for is remembered.

    Leads that are still in the input come without these answers from then on.
    """
    job = job_options.load()
    confirmed = _confirmed("What was answered before then will be erased for good; outputs will lack it.", yes=yes)
    count = purge_answers(job, timedelta(seconds=older_than)) if confirmed else 0
    _echo_count(count, "purged", as_json=as_json)
