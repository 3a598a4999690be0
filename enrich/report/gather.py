"""Puts the report together from ledger and input alone: no network, nothing written, one view of one moment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from enrich.cascade import Cascade, read_offers
from enrich.connect import remembered
from enrich.errors import EnrichError, Refused
from enrich.job import Job
from enrich.model import Settled, by_status, to_credits
from enrich.offline import joined
from enrich.place import STDIN
from enrich.question import Question
from enrich.report.anomalies import Nights, anomalies
from enrich.report.earned import as_waterfall
from enrich.report.facts import Night, Report, Waterfall
from enrich.report.needs import waiting
from enrich.report.nights import latencies, nights, traffic
from enrich.report.present import MOST_VALUES, Present, read_present
from enrich.store.database import exists
from enrich.store.ledger import Ledger
from enrich.store.lock import is_held
from enrich.watch.outcome import Need, Target
from enrich.watch.runlog import without_data

#: The last night is held against so many before it that were answered something.
BEFORE = 7


def gather(job: Job, target: Target, now: datetime, *, with_rows: bool = False) -> Report:
    """Put together what the report of a job tells at a time; `target` is the job as commands name it.

    What can't be read is not known, and a note says why. Raises Refused when the ledger can't be read.
    """
    if not exists(job.ledger):
        return _report(job, now, notes=["this job has never run: nothing is known yet"])
    with closing(Ledger(job.ledger, read_only=True)) as ledger, ledger.still():
        return _gather(job, ledger, target, now, with_rows=with_rows)


def _gather(job: Job, ledger: Ledger, target: Target, now: datetime, *, with_rows: bool) -> Report:
    now_ms = int(now.timestamp() * 1000)
    held = is_held(job.ledger)
    lived = ledger.lived(job.name)
    # A run may have begun just before this moment of the ledger, or ended just after it: neither was killed.
    held = held or is_held(job.ledger)
    told = nights(lived, ledger.fates(job.name), ledger.newest_execution(), at_work=held)
    last = told[-1] if told else None
    present, unread = _present(job, ledger, now_ms, with_rows=with_rows)
    answers = _Answers(ledger, job, told)
    for settled in ledger.settled(job.name):
        answers.add(settled)
    requests = by_status(ledger.counts())
    known = requests if present is None else present.by_status()
    output = str(job.output_path(now.astimezone()))
    told_in = output if job.model.rejects is None else str(job.place(job.model.rejects.path, now.astimezone()))
    earnings = answers.cascade.earnings()
    return _report(
        job,
        now,
        waterfall=as_waterfall(job.model.waterfall, earnings),
        nights=told,
        present=present,
        requests=requests,
        credits_spent=to_credits(sum(row.spent for row in lived)),
        credits_unknown=sum(row.unknown for row in lived),
        planned=_planned(lived[-1].receipt if lived else None),
        latencies=latencies(ledger.waits(job.name)),
        traffic=traffic(ledger, lived, now_ms),
        anomalies=anomalies(answers.last, answers.before),
        needs=[
            *unread.needs(target),
            *waiting(last, known, "request" if present is None else "row", told_in, target),
        ],
        notes=[*unread.notes(), *_notes(told, present, answers.erased, others=ledger.serves_others(job.name))],
    )


def _report(job: Job, now: datetime, *, present: Present | None = None, **known: Any) -> Report:  # noqa: ANN401 - fields of it
    nothing: dict[str, Any] = {
        "waterfall": Waterfall(job.model.waterfall, (), 0, 0, 0, 0.0, 0.0),
        "nights": (),
        "requests": by_status({}),
        "credits_spent": 0.0,
        "credits_unknown": 0,
        "planned": None,
        "latencies": None,
        "traffic": None,
        "anomalies": (),
        "needs": (),
    }
    rows: dict[str, Any] = {"rows": None, "statuses": {}, "columns": (), "groups": (), "ages": (), "leads": None}
    if present is not None:
        rows |= {name: getattr(present, name) for name in ("rows", "columns", "groups", "ages", "leads")}
        rows["statuses"] = present.by_status()
    return Report(
        job=job.name,
        made_at=now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        ledger=str(job.ledger),
        input=str(job.input_path),
        output=str(job.output_path(now.astimezone())),
        **nothing | rows | known,
    )


@dataclass(frozen=True, slots=True)
class _Unread:
    """Why nothing is known of the rows, and whether somebody should look at that."""

    why: str | None = None
    calm: bool = True

    @property
    def _text(self) -> str:
        return f"nothing is known of the rows: {self.why}"

    def needs(self, target: Target) -> Iterator[Need]:
        if not self.calm:
            yield Need(self._text, (f"enrich check {target.run}",))

    def notes(self) -> Iterator[str]:
        if self.calm and self.why is not None:
            yield self._text


def _present(job: Job, ledger: Ledger, now_ms: int, *, with_rows: bool) -> tuple[Present | None, _Unread]:
    """Read the present input, or tell why it can't be read."""
    if job.input_path == STDIN:
        return None, _Unread("the input came through a pipe; --input names a file instead")
    try:
        question = _question(ledger, job)
    except EnrichError as error:
        return None, _Unread(error.message, calm=isinstance(error, Refused))
    try:
        by = [] if job.model.report is None else job.model.report.by
        return read_present(joined(ledger, job, question), by, now_ms, with_rows=with_rows), _Unread()
    except EnrichError as error:
        return None, _Unread(without_data(error.message), calm=False)


def _question(ledger: Ledger, job: Job) -> Question:
    try:
        return remembered(ledger, job)
    except ValidationError as error:
        raise Refused(
            "nobody understands what the ledger remembers of the waterfall", "enrich run asks again"
        ) from error


class _Answers:
    """What all answers of the job add up to, each read once: who earned it, and what the nights were like."""

    def __init__(self, ledger: Ledger, job: Job, told: Sequence[Night]) -> None:
        try:
            paths: Mapping[str, str] = _question(ledger, job).columns
        except EnrichError:
            paths = job.model.columns or {}
        answered = [night.execution for night in told if night.answered + night.failed]
        self.cascade = Cascade(read_offers(ledger.waterfalls()))
        self.last, self.before = Nights(paths), Nights(paths)
        self.erased = 0
        self._sides = dict.fromkeys(answered[-1 - BEFORE : -1], self.before) | dict.fromkeys(answered[-1:], self.last)

    def add(self, settled: Settled) -> None:
        self.cascade.add(settled)
        self.erased += settled.erased
        side = self._sides.get(settled.execution)
        if side is not None:
            side.add(settled)


def _planned(receipt: str | None) -> Mapping[str, float | None] | None:
    planned = json.loads(receipt).get("planned") if receipt else None
    return planned if isinstance(planned, dict) else None


def _notes(told: Sequence[Night], present: Present | None, erased: int, *, others: bool) -> Iterator[str]:
    """Say what the numbers do not tell by themselves."""
    if not told:
        yield "this job has never run with this ledger"
    if others:
        yield "other jobs use this ledger, too: the requests are those of all, nights and credits are this job's own"
    if killed := [night.execution for night in told if night.outcome == "killed"]:
        was = f"execution {killed[0]} was" if len(killed) == 1 else f"{len(killed):,} executions were"
        yield f"{was} killed and left no receipt: rows, polls, 429s, time and last balance are not known"
    if told and told[-1].outcome == "at work now":
        yield f"execution {told[-1].execution} is at work now: its numbers still grow"
    if erased:
        yield f"{erased:,} answers were purged or forgotten: nobody can tell any more whom they asked"
    for column in [] if present is None else present.ungrouped:
        yield f"the column `{column}` makes no groups: it has more than {MOST_VALUES:,} different values"
    if present is not None and present.purged:
        yield f"{present.purged:,} rows have an answer that was purged: they are left out of the columns' hit rates"
    if unknown := sum(night.credits_unknown for night in told):
        yield f"{unknown:,} answers have no known price: the credits are at least those that are told"
