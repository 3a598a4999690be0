"""`enrich explain`: everything that ever happened to one lead, from input and ledger, without network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from enrich.api.answer import is_blank, parse_data, pick
from enrich.connect import remembered
from enrich.job import Job
from enrich.look.leads import SHOWN, Lead, matching, numbered, parse_match, places_of, would_send
from enrich.look.prospects import outlook
from enrich.model import Call, RowStatus, State, iso, to_credits
from enrich.privacy import Forgotten
from enrich.question import Question
from enrich.rows import Rows
from enrich.store.database import exists
from enrich.store.history import History, Known, Try
from enrich.store.ledger import Ledger
from enrich.store.lock import is_held


def explain(job: Job, row: int | None, match: str | None) -> dict[str, Any]:
    """Return the object of `enrich explain --json` for a row, or for those that match `COLUMN=VALUE`.

    Raises JobError when the input has no such row or column, Refused when it can't be read.
    """
    question, forgotten = _remembered(job)
    rows = Rows(job, forgotten)
    asks = question or Question(Call(job.model.waterfall, ()), (), (), {}, None)
    if match is not None:
        column, value = parse_match(match, rows.columns)
        found = matching(rows, asks, column, value)
    else:
        found = numbered(job, rows, asks, row or 0)
    told: dict[str, Any] = {
        "job": job.name,
        "input": str(job.input_path),
        "ledger": str(job.ledger),
        "ever_ran": question is not None,
        "matches": found.count,
    }
    if question is None:
        return told | {"rows": [_untold(job, lead) for lead in found.leads], "gone": []}
    with closing(History(job.ledger)) as history:
        history.begin()
        teller = _Teller(job, question, history, is_held(job.ledger))
        candidates = list(history.with_param(would_send(job, column, value))) if match is not None else []
        wanted = {lead.fingerprint for lead in found.leads if lead.fingerprint is not None}
        wanted |= {known.fingerprint for known in candidates}
        places = places_of(rows, question, wanted)
        asked = {lead.params for lead in found.leads}
        gone = [known for known in candidates if known.fingerprint not in places and known.params not in asked]
        return told | {
            "rows": [teller.row(lead, places) for lead in found.leads],
            "gone": [teller.request(known) for known in gone[:SHOWN]],
        }


def _remembered(job: Job) -> tuple[Question | None, Forgotten | None]:
    """Make the question from the ledger, and tell who was forgotten; None when this job has never run."""
    if not exists(job.ledger):
        return None, None
    with closing(Ledger(job.ledger, read_only=True)) as ledger:
        known = ledger.waterfall(job.model.waterfall)
        return None if known is None else remembered(ledger, job), ledger.forgotten()


# Telling of them


def _untold(job: Job, lead: Lead) -> dict[str, Any]:
    """Tell of a row that no ledger knows."""
    return {
        "row": lead.number,
        "status": lead.status or RowStatus.PENDING,
        "why": _why_not(job, lead),
        "asks_with": _asks_with(job, lead),
        "params": None if lead.params is None else json.loads(lead.params),
        "fingerprint": None if lead.fingerprint is None else lead.fingerprint.hex(),
        "shared_with": [],
        "request": None,
        "other_questions": [],
    }


def _why_not(job: Job, lead: Lead) -> str | None:
    if lead.error is not None or lead.status is not RowStatus.FILTERED:
        return lead.error
    full = [column for column in job.model.only_if_empty if lead.cells.get(column, "").strip()]
    if full:
        return f"only_if_empty: {', '.join(full)} has a value"
    return f"where: {job.model.where}" if job.model.where is not None else None


def _asks_with(job: Job, lead: Lead) -> dict[str, dict[str, str]]:
    """Tell for each param the cells that it may come from."""
    return {
        name: {column: lead.cells[column] for column in param.columns if column in lead.cells}
        for name, param in job.model.params.items()
    }


@dataclass(frozen=True, slots=True)
class _Teller:
    """Tells what a ledger knows."""

    job: Job
    question: Question
    history: History
    at_work: bool | None
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000

    def row(self, lead: Lead, places: Mapping[bytes, list[int]]) -> dict[str, Any]:
        told = _untold(self.job, lead)
        if lead.fingerprint is None or lead.params is None:
            return told
        alike = list(self.history.same_params(lead.params))
        known = self.history.request(lead.fingerprint)
        call = self.question.call.body() | {"waterfall": self.question.call.waterfall}
        told["shared_with"] = [number for number in places.get(lead.fingerprint, []) if number != lead.number]
        told["other_questions"] = [self.request(one) for one in alike if one.call != call]
        if known is not None:
            told["request"] = self.request(known)
            told["status"], told["why"] = self._standing(known)
        return told

    def request(self, known: Known) -> dict[str, Any]:
        attempts = self.history.attempts(known.id)
        policy = self.job.model.policy
        return {
            "fingerprint": known.fingerprint.hex(),
            "state": known.state,
            **known.call,
            "params": json.loads(known.params),
            "attempts": [_attempt(attempt) for attempt in attempts],
            "outlook": outlook(known.state, attempts, policy, self.now_ms(), at_work=self.at_work),
        }

    def _standing(self, known: Known) -> tuple[RowStatus, str | None]:
        """Tell the row's status as the output has it: the last found answer stands, and this job's columns decide."""
        attempts = {attempt.id: attempt for attempt in self.history.attempts(known.id)}
        shown = attempts.get(known.answer_id or known.attempt_id or 0)
        state = State.FOUND if known.answer_id else known.state
        if shown is None or state not in (State.FOUND, State.NOT_FOUND):
            return RowStatus.of(state), None if shown is None else shown.error
        if shown.answer is None:
            return RowStatus.of(state), "its answer was purged; that it was paid for is remembered"
        fields = _fields(shown)
        has = any(not is_blank(pick(fields, path)) for path in self.question.columns.values())
        return RowStatus.FOUND if has else RowStatus.NOT_FOUND, shown.error


def _fields(attempt: Try) -> Mapping[str, Any]:
    return parse_data(json.loads(attempt.answer).get("data")).fields if attempt.answer else {}


def _attempt(attempt: Try) -> dict[str, Any]:
    return {
        "attempt": attempt.id,
        "execution": attempt.execution,
        "job": attempt.job,
        "state": attempt.state,
        "intent_at": iso(attempt.claimed_ms),
        "task_id": attempt.task_id,
        "submitted_at": None if attempt.submitted_ms is None else iso(attempt.submitted_ms),
        "settled_at": None if attempt.settled_ms is None else iso(attempt.settled_ms),
        "settled_in": attempt.settled_in,
        "credits_reserved": to_credits(attempt.reserved),
        "credits": to_credits(attempt.credits),
        "together": attempt.together,
        "task_credits": to_credits(attempt.task_credits),
        "provider": attempt.provider,
        "error": attempt.error,
        "answer": dict(_fields(attempt)) or None,
    }


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Write it for a person."""
    if not told["ever_ran"]:
        yield f"{told['job']} has never run: nothing was ever asked ({told['ledger']})"
    if told["matches"] > SHOWN:
        yield f"{told['matches']:,} rows match; the first {SHOWN}:"
    for row in told["rows"]:
        yield from _row_lines(row)
    if not told["rows"]:
        yield f"no row of {told['input']} matches"
    for request in told["gone"]:
        yield "not in the input any more, but in the ledger:"
        yield from _request_lines(request)


def _row_lines(row: Mapping[str, Any]) -> Iterator[str]:
    why = f", {row['why']}" if row["why"] else ""
    yield f"row {row['row']}: {row['status']}{why}"
    for param, cells in row["asks_with"].items():
        sent = (row["params"] or {}).get(param)
        of = "; ".join(f"{column}: {cell!r}" for column, cell in cells.items()) or "a constant"
        asked = repr(sent) if sent is not None else "nothing" if row["params"] is not None else "not asked"
        yield f"  {param:<12}{asked}  from {of}"
    if shared := row["shared_with"]:
        more = f" and {len(shared) - SHOWN:,} more" if len(shared) > SHOWN else ""
        yield f"  the same is asked by row {', '.join(map(str, shared[:SHOWN]))}{more}; paid once"
    if row["request"] is not None:
        yield from _request_lines(row["request"])
    elif row["fingerprint"] is not None:
        yield "  never asked so far; the next run asks"
    for request in row["other_questions"]:
        yield "  the same lead was also asked as another question (other providers, verifier or waterfall):"
        yield from _request_lines(request)


def _request_lines(request: Mapping[str, Any]) -> Iterator[str]:
    providers = ", ".join(map(str, request["enrichments"]))
    verifier = f", verifier {request['email_verifier']}" if "email_verifier" in request else ""
    yield f"  request {request['fingerprint']}: {request['waterfall']}, providers {providers}{verifier}"
    yield f"    sent {json.dumps(request['params'], ensure_ascii=False)}"
    for number, attempt in enumerate(request["attempts"], start=1):
        yield f"    attempt {number} in execution {attempt['execution']} of {attempt['job']}: {attempt['state']}"
        yield from (f"      {line}" for line in _attempt_lines(attempt))
    yield f"    {request['outlook']}"


def _attempt_lines(attempt: Mapping[str, Any]) -> Iterator[str]:
    yield f"{attempt['intent_at']}  intent written, {attempt['credits_reserved']:,.2f} credits reserved at most"
    if attempt["submitted_at"]:
        others = f", with {attempt['together'] - 1:,} others" if (attempt["together"] or 1) > 1 else ""
        yield f"{attempt['submitted_at']}  accepted as task {attempt['task_id']}{others}"
    if attempt["settled_at"]:
        price = _price(attempt)
        by = f", by {attempt['provider']}" if attempt["provider"] else ""
        within = attempt["settled_in"]
        where = f" in execution {within}" if within not in (None, attempt["execution"]) else ""
        yield f"{attempt['settled_at']}  {attempt['state']}{where}, {price}{by}"
    if attempt["error"]:
        yield f"error: {attempt['error']}"
    for name, value in (attempt["answer"] or {}).items():
        plain = isinstance(value, str) and value.isprintable()
        yield f"{name}: {value if plain else json.dumps(value, ensure_ascii=False)}"


def _price(attempt: Mapping[str, Any]) -> str:
    if attempt["task_credits"] is not None:
        whole = f" for all {attempt['together']:,} of the task" if attempt["together"] > 1 else ""
        return f"{attempt['task_credits']:,.2f} credits{whole}"
    return "price not known" if attempt["credits"] is None else f"{attempt['credits']:,.2f} credits"
