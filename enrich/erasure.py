"""Erases what a ledger holds of people: one person at her wish, or everybody's answers when they are old."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from enrich.api.answer import is_blank, parse_data, pick
from enrich.connect import remembered
from enrich.errors import EnrichError, JobError, Refused
from enrich.job import Job, nearest
from enrich.model import OPEN, SystemClock
from enrich.privacy import make_key
from enrich.question import Question
from enrich.rows import Rows
from enrich.store.database import exists
from enrich.store.ledger import Ledger
from enrich.store.opening import alone
from enrich.store.rescue import remove_taken, take_in_files
from enrich.store.rescue_file import rescue_files
from enrich.surroundings import rescue_folders
from enrich.tables.cells import text_frame


def forget(job: Job, matches: Sequence[str], confirm: Callable[[int], bool]) -> int:
    """Erase every request about a person; return how many.

    A request is hers when all of `matches` (`NAME=VALUE`, without regard to case and outer blanks) hold for
    a row of the input that asks it, or for its params and answers. A hash under a key of the ledger's stays,
    so that nobody asks about her again. Raises JobError for a name that is unknown everywhere, and LedgerLocked.
    """
    wanted = dict(_parted(match) for match in matches)
    with _opened(job) as ledger:
        question = remembered(ledger, job)
        asking = _asking_rows(job, question, wanted)
        found = [
            known
            for known in map(dict, ledger.requests())
            if known["fingerprint"] in asking or _is_about(known, job, question, wanted)
        ]
        waiting = sum(known["state"] in OPEN for known in found)
        if waiting:
            raise Refused(f"{waiting} of them wait at the API for their answer", "enrich run collects them; then again")
        if not found or not confirm(len(found)):
            return 0
        ledger.forgotten()  # refuses when the key to earlier ones is gone: a new one would not know them
        key = make_key(job.ledger)
        with ledger.transaction():
            # What was purged has no params any more; then the input tells them.
            told = (
                (known["id"], known["fingerprint"], asking.get(known["fingerprint"], known["params"]))
                for known in found
            )
            ledger.forget(key, told, SystemClock().now_ms())
        return len(found)


def purge(job: Job, older_than: timedelta) -> int:
    """Drop params and answers of what was settled longer ago; return how many requests. Raises LedgerLocked."""
    now_ms = SystemClock().now_ms()
    with _opened(job) as ledger, ledger.transaction():
        return ledger.purge(now_ms - int(older_than.total_seconds() * 1000), now_ms)


@contextmanager
def _opened(job: Job) -> Iterator[Ledger]:
    """Hold and open the ledger so that what is erased is gone from the file, too."""
    folders = rescue_folders(job)
    if not exists(job.ledger):
        if isinstance(job.ledger, Path) and (left := rescue_files(job.ledger, folders)):
            raise Refused(
                f"{job.ledger}: there is no ledger, but {left[0]} holds what it knew",
                "enrich run JOB --limit 0 takes that in; then the same command again",
            )
        raise Refused(f"{job.ledger}: there is no ledger: this job has never run")
    with alone(job.ledger) as fence, closing(Ledger(job.ledger, fence=fence)) as ledger:
        ledger.erase_for_good()
        with ledger.transaction():  # so that nothing is left beside the ledger
            taken = take_in_files(ledger, folders, job.name, SystemClock().now_ms())
        remove_taken(taken)
        yield ledger
        if not ledger.empty_journal():
            raise Refused(
                f"{job.ledger} is being read, by `enrich report` perhaps: what was erased is still in the file",
                "when that has ended, the same command again takes it out",
            )


def _parted(match: str) -> tuple[str, str]:
    name, equals, value = match.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise JobError(f"--match {match}: must be NAME=VALUE, such as Email=ada@engine.example")
    return name.strip(), _folded(value)


def _folded(value: str) -> str:
    return value.strip().casefold()


def _asking_rows(job: Job, question: Question, wanted: Mapping[str, str]) -> dict[bytes, str]:
    """Name the requests of the rows of the input that match, with their params; none when tonight's file is no good."""
    rows = None
    try:
        rows = Rows(job)
    except EnrichError:
        columns: list[str] = []
    else:
        columns = rows.columns
    known = [*columns, *job.model.params, *question.columns]
    known += [name for param in job.model.params.values() for name in param.columns]
    for name in wanted:
        if name not in known:
            hint = nearest(name, known)
            raise JobError(f"--match {name}=…: neither the input nor the job has a column `{name}`", hint)
    if rows is None or not set(wanted) <= set(columns):
        return {}
    places = {columns.index(name): value for name, value in wanted.items()}
    return {
        fingerprint: params
        for batch in rows.batches(question)
        for cells, fingerprint, params in zip(
            text_frame(batch.frame).iter_rows(), batch.fingerprints, batch.params, strict=True
        )
        if fingerprint is not None
        and params is not None
        and all(_folded(str(cells[place])) == value for place, value in places.items())
    }


def _is_about(known: Mapping[str, Any], job: Job, question: Question, wanted: Mapping[str, str]) -> bool:
    """Tell whether a request's params and answers match all that is wanted."""
    params = json.loads(known["params"])
    answers = [json.loads(answer) for answer in json.loads(known["answers"]) if answer]
    fields = [parse_data(answer.get("data")).fields for answer in answers]
    return bool(params or fields) and all(
        any(_folded(value) == text for value in _values(name, text, params, fields, job, question))
        for name, text in wanted.items()
    )


def _values(  # noqa: PLR0913, PLR0917 - one name is looked up in all of them
    name: str, text: str, params: Mapping[str, str], fields: list[Any], job: Job, question: Question
) -> Iterator[str]:
    """Yield what a request has under a name: a param, a column that a param comes from, a column of the output."""
    for param, source in job.model.params.items():
        if param in params and (name == param or name in source.columns):
            yield params[param]
    for field in fields:
        if name in question.columns:
            yield str(pick(field, question.columns[name]))
        elif "@" in text:  # an address names its person wherever it stands
            yield from (str(value) for value in field.values() if not is_blank(value))
