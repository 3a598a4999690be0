"""`enrich forget` and `enrich purge`: erase one person, or old params and answers, from a ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import click
from msgspec.structs import replace

from enrich.commands import options
from enrich.commands.forget_steps import RowRequests, follow_answers, requests_of_rows
from enrich.commands.streams import ask, can_ask
from enrich.databar.clock import SystemClock
from enrich.databar.task_results import column_values
from enrich.errors import CommandRefused, EnrichError, JobError, suggest_name
from enrich.job.cell_text import fold
from enrich.job.job import Job
from enrich.job.locations import sandbox_state_path
from enrich.json_text import parse_json
from enrich.ledger import erasure, queries
from enrich.ledger.database import Database, ledger_exists, try_read
from enrich.ledger.dialect import DATABASE_ERRORS
from enrich.ledger.erasure import read_or_make_key
from enrich.ledger.lock import open_exclusive
from enrich.ledger.rescue_import import import_and_remove
from enrich.models import OPEN_STATES, pluralize, to_ms
from enrich.rows.job_input import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.context import check_ledger_exists, rescue_folders
from enrich.run.preflight import find_template, template_from_ledger
from enrich.sandbox.store import StoredLookup, erase_lookups, read_lookups

YES_OPTION = click.option("--yes", is_flag=True, help="Skip the confirmation.")


class ForgottenCounts(NamedTuple):
    """How many requests about a person are in the ledger, how many more the input has, and the params of all."""

    erased: int = 0
    unsent: int = 0
    params: frozenset[str] = frozenset()

    def prompt(self) -> str:
        """Return what will be done, as a sentence."""
        if not self.erased:
            return f"Later runs skip {pluralize(self.unsent, 'request')} of this person. None is in the ledger."
        return f"This permanently erases {pluralize(self.erased, 'request')}{self._skipped()}."

    def result(self) -> str:
        """Return what was done."""
        return f"{pluralize(self.erased, 'request')} erased{self._skipped()}"

    def _skipped(self) -> str:
        return f"; later runs skip {self.unsent} more that are not in the ledger" if self.unsent else ""


def forget_person(job: Job, matches: Sequence[str], confirm: Callable[[ForgottenCounts], bool]) -> ForgottenCounts:
    """Erase every request about a person. Return how many there were.

    `matches` are `NAME=VALUE` texts, combined with AND. Case and surrounding spaces are ignored. A request matches if
    an input row with this request matches, whether or not the job's conditions hold for it, or if its params and
    answers match. Hashes made with the ledger's key are kept, also of requests that were never sent, so that none about
    this person is sent any more. If `confirm` returns False, nothing is erased. Raises JobError for a name that is
    neither in the input nor in the job, CommandRefused if a matching request is still running at Databar, and
    LedgerLocked.
    """
    criteria = _parse_matches(matches)
    with _open_for_erasing(job) as ledger:
        _check_targets_are_known(ledger, job)
        template = template_from_ledger(ledger, job)
        matching, of_others = _matching_requests(job, template, criteria, ledger)
        params_of_rows = frozenset(matching.values())
        found = [
            known
            for known in map(dict, erasure.requests_with_answers(ledger))
            if known["fingerprint"] in matching
            or known["params"] in params_of_rows
            or _matches_person(*_read_request(known), job, template.columns, criteria)
        ]
        if job.step_jobs:
            found = follow_answers(job, ledger, found, of_others)
        waiting = sum(known["state"] in OPEN_STATES for known in found)
        if waiting:
            raise CommandRefused(
                f"{job.ledger}: {pluralize(waiting, 'request')} of this person still running at Databar",
                f"collect {'it' if waiting == 1 else 'them'} with `enrich run JOB --limit 0`, then run this again",
            )
        # Raises if the key of earlier hashes is missing: a new key would not match them.
        forgotten = erasure.load_forgotten(ledger)
        in_ledger = {known["fingerprint"] for known in found}
        unsent = {
            params for name, params in matching.items() if name not in in_ledger and params not in forgotten
        }.difference(known["params"] for known in found)
        params = params_of_rows.union(known["params"] for known in found)
        counts = ForgottenCounts(len(found), len(unsent), params)
        if not (found or unsent):
            return counts
        if not confirm(counts):
            return ForgottenCounts()
        key = read_or_make_key(job.ledger)
        with ledger.transaction():
            # Purged requests have no params in the ledger, so prefer the params from the input.
            forgotten_rows = (
                (known["id"], known["fingerprint"], matching.get(known["fingerprint"], known["params"]))
                for known in found
            )
            erasure.forget(ledger, key, forgotten_rows, SystemClock().now_ms(), unsent)
        return counts


def forget_in_sandbox_state(
    job: Job, matches: Sequence[str], known_params: Collection[str], confirm: Callable[[int], bool]
) -> int:
    """Erase the requests and results about a person from the sandbox of the ledger. Return the number of lookups.

    A lookup has the params of its request: it is found by `known_params`, those of the person's requests elsewhere (as
    JSON), and by `matches` with these, its answers and the job's columns.
    """
    criteria = _parse_matches(matches)
    known = list(map(json.loads, known_params))
    columns = {name: path for step in job.steps for name, path in (step.model.columns or {}).items()}

    def is_person(lookup: StoredLookup) -> bool:
        params, answers = json.loads(lookup.params), [json.loads(data) for data in lookup.answers]
        return params in known or _matches_person(params, answers, job, columns, criteria)

    return _erase_from_sandbox_state(job, is_person, confirm)


def _erase_from_sandbox_state(job: Job, choose: Callable[[StoredLookup], bool], confirm: Callable[[int], bool]) -> int:
    state = sandbox_state_path(job.ledger)
    if not state.is_file():
        return 0
    try:
        chosen = [lookup.id for lookup in read_lookups(state) if choose(lookup)]
        if not chosen or not confirm(len(chosen)):
            return 0
        erase_lookups(state, chosen)
    except DATABASE_ERRORS as error:
        message = f"{state}: the data of the sandbox cannot be erased: {error}"
        raise CommandRefused(message, "end the sandbox run that uses it, then run this again") from error
    return len(chosen)


@contextmanager
def _open_for_erasing(job: Job) -> Iterator[Database]:
    """Lock and open the ledger so that erased data is also removed from its file. Raises CommandRefused."""
    check_ledger_exists(job)
    with open_exclusive(job.ledger) as fence, closing(Database(job.ledger, fencing_token=fence)) as ledger:
        ledger.session.enable_secure_delete()
        # So that no rescue file with the data is left beside the ledger.
        import_and_remove(ledger, rescue_folders(job), job.name, SystemClock().now_ms())
        yield ledger
        if not ledger.session.discard_erased_data():
            raise CommandRefused(
                f"{job.ledger} is in use by another command, so the erased data is still in the file",
                "run this again after that command ends",
            )


def _check_targets_are_known(ledger: Database, job: Job) -> None:
    """Raise CommandRefused if the ledger does not have how a target reads its params: hashes of unsent ones need it."""
    for step in job.steps:
        if not find_template(ledger, step)[1]:
            name = f"the step `{step.step}`" if step.step else "this job"
            message = f"{job.ledger}: {name} has never run, so what it would send for this person is not known"
            raise CommandRefused(message, "first, which costs nothing: enrich run JOB --max-credits 0")


def _parse_matches(matches: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` texts. Raises JobError, also for a name with two values, which no person has."""
    criteria: dict[str, str] = {}
    for match in matches:
        name, equals, value = (part.strip() for part in match.partition("="))
        if not (name and equals and value):
            raise JobError(f"--match {match}: must be NAME=VALUE, such as Email=ada@engine.example")
        if criteria.setdefault(name, fold(value)) != fold(value):
            raise JobError(f"--match {name}=…: two values of `{name}`", "erase one person after the other")
    return criteria


def _matching_requests(
    job: Job, template: RequestTemplate, criteria: Mapping[str, str], ledger: Database
) -> RowRequests:
    """Return the requests of matching input rows. Empty if the input is unusable."""
    # The person's rows count, whether or not the job's conditions hold for them today.
    job = replace(job, model=job.model.model_copy(update={"where": None, "only_if_empty": [], "suppress": None}))
    job_input: JobInput | None = None
    input_error: EnrichError | None = None
    try:
        job_input = JobInput(job)
    except EnrichError as error:
        input_error = error
    columns = [] if job_input is None else job_input.columns
    params = [param for step in job.steps for param in step.model.params.items()]
    known = [*columns, *(name for name, _ in params), *template.columns]
    known += [name for _, param in params for name in param.columns]
    for name in criteria:
        if name not in known:
            hint = suggest_name(name, known)
            raise input_error or JobError(f"--match {name}=…: the input and the job have no column `{name}`", hint)
    if job_input is None or not (job.step_jobs or set(criteria) <= set(columns)):
        return RowRequests({}, ())
    return requests_of_rows(job_input, template, ledger, criteria)


def _read_request(request: Mapping[str, Any]) -> tuple[dict[str, str], list[object]]:
    """Return the params and the answers of a request in the ledger."""
    answers = [parse_json(answer).get("data") for answer in json.loads(request["answers"]) if answer]
    return json.loads(request["params"]), answers


def _matches_person(
    params: Mapping[str, str],
    answers: Sequence[object],
    job: Job,
    columns: Mapping[str, str],
    criteria: Mapping[str, str],
) -> bool:
    """Check whether the params and answers of a request match all criteria."""
    return bool(params or answers) and all(
        any(fold(value) == text for value in _values_named(name, text, params, answers, job, columns))
        for name, text in criteria.items()
    )


def _values_named(
    name: str, text: str, params: Mapping[str, str], answers: Sequence[object], job: Job, columns: Mapping[str, str]
) -> Iterator[str]:
    """Yield a request's values for a name, which is a param, an input column of a param, or an output column."""
    sources = [(param, source) for step in job.steps for param, source in step.model.params.items()]
    for param, source in sources:
        if param in params and (name == param or name in source.columns):
            yield params[param]
    for data in answers:
        if name in columns:
            yield str(column_values(data, [columns[name]])[0])
        if "@" in text:  # an email address identifies a person in any field
            yield from _texts(data)


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a value, at any depth of lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _confirm(prompt: str) -> bool:
    """Ask for confirmation. Raises UsageError without a terminal."""
    if not can_ask():
        raise click.UsageError(f"{prompt} Without a terminal, add --yes")
    return ask(f"{prompt}\nContinue?")


def _jobs_to_erase(job_options: options.JobOptions) -> list[Job]:
    """Return the job, and for the sandbox where that has data. With `--sandbox` only the latter."""
    sandbox_job = replace(job_options, use_sandbox=True).load()
    if job_options.use_sandbox:
        return [sandbox_job]
    job = job_options.load()
    has_sandbox = _has_requests(sandbox_job) or sandbox_state_path(sandbox_job.ledger).is_file()
    if not has_sandbox:
        return [job]
    return [job, sandbox_job] if ledger_exists(job.ledger) else [sandbox_job]


def _has_requests(job: Job) -> bool:
    return ledger_exists(job.ledger) and bool(try_read(job.ledger, queries.state_counts) != {})


def _erase(
    job_options: options.JobOptions, from_ledger: Callable[[Job], int], from_sandbox: Callable[[Job], int]
) -> int:
    """Erase from the ledgers and from the states of the sandbox that exist. Return how many requests."""
    count = 0
    for job in _jobs_to_erase(job_options):
        state_exists = job.sandbox and sandbox_state_path(job.ledger).is_file()
        with replace(job_options, use_sandbox=job.sandbox).named_in_hints():
            in_ledger = from_ledger(job) if not state_exists or _has_requests(job) else 0
            # The sandbox stores the requests that its ledger has: they count once.
            count += max(in_ledger, from_sandbox(job) if state_exists else 0)
    return count


@click.command()
@options.job_options(sandbox="Erase from the sandbox only.")
@click.option(
    "--match",
    "matches",
    multiple=True,
    required=True,
    metavar="NAME=VALUE",
    help="Value that identifies the person. Several are combined with AND.",
)
@YES_OPTION
@options.JSON_OPTION
def forget(job_options: options.JobOptions, matches: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Erase a person from the ledger of JOB and from its sandbox. Later runs skip this person.

    NAME is a column of the input, a param or a new column. Matching ignores case and surrounding spaces. Erase
    outputs and backups yourself.
    """
    confirmed = [True] if yes else []
    unsent = 0
    known_params: set[str] = set()

    def confirm(counts: ForgottenCounts) -> bool:
        """Ask once for the ledger and the sandbox."""
        if not confirmed:
            confirmed.append(_confirm(counts.prompt()))
        return confirmed[0]

    def from_ledger(job: Job) -> int:
        """Erase from a ledger. `unsent` is of the ledger that the command names, not of the sandbox beside it."""
        nonlocal unsent
        counts = forget_person(job, matches, confirm)
        if job.sandbox == job_options.use_sandbox:
            unsent = counts.unsent
        known_params.update(counts.params)
        return counts.erased

    erased = _erase(
        job_options,
        from_ledger,
        lambda job: forget_in_sandbox_state(job, matches, known_params, lambda found: confirm(ForgottenCounts(found))),
    )
    result = {"exit_code": 0, "requests": erased, "never_sent": unsent}
    options.echo_result(result, [ForgottenCounts(erased, unsent).result()], as_json=as_json)


@click.command()
@options.job_options(sandbox="Erase from the sandbox only.")
@click.option("--older-than", type=options.SECONDS, required=True, metavar="90d", help="Erase results older than this.")
@YES_OPTION
@options.JSON_OPTION
def purge(job_options: options.JobOptions, older_than: float, yes: bool, as_json: bool) -> None:
    """Erase old params and results from the ledger of JOB and from its sandbox.

    The ledger keeps that the requests were paid, so they are not sent again. Outputs written later lack these
    results.
    """
    confirmed = yes or _confirm("This permanently erases older results. Outputs written later lack them.")
    now_ms = SystemClock().now_ms()
    before_ms = now_ms - to_ms(timedelta(seconds=older_than))

    def from_ledger(job: Job) -> int:
        with _open_for_erasing(job) as ledger, ledger.transaction():
            return erasure.purge(ledger, before_ms, now_ms)

    def from_sandbox(job: Job) -> int:
        return _erase_from_sandbox_state(job, lambda lookup: lookup.last_sent_at < before_ms / 1000, lambda _: True)

    count = _erase(job_options, from_ledger, from_sandbox) if confirmed else 0
    lines = [f"{pluralize(count, 'request')} purged"]
    options.echo_result({"exit_code": 0, "requests": count}, lines, as_json=as_json)
