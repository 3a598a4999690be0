"""The history of a request, and the status of a row in it: for `enrich explain`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from msgspec import Struct

from enrich.databar.task_results import has_value, parse_data
from enrich.job.cell_text import clean
from enrich.job.job import Job
from enrich.job.spec import Policy
from enrich.job.target import Target, TargetKind
from enrich.json_text import parse_json
from enrich.ledger import queries
from enrich.ledger.database import Database
from enrich.ledger.queries import AttemptRow, RequestRow
from enrich.models import RowStatus, State, iso_time, to_credits, to_ms
from enrich.rows.template import RequestTemplate

MAX_LEADS_SHOWN = 20


class Lead(Struct, frozen=True):
    """A row of the input, counted from 1, with its request."""

    number: int
    cells: Mapping[str, str]
    fingerprint: bytes | None
    params: str | None
    status: RowStatus | None
    error: str | None


def row_without_request(job: Job, lead: Lead) -> dict[str, Any]:
    """Describe a row that has no request in the ledger."""
    return {
        "row": lead.number,
        "status": lead.status or RowStatus.PENDING,
        "why": _why_not_sent(job, lead),
        "asks_with": {
            name: {column: lead.cells[column] for column in param.columns if column in lead.cells}
            for name, param in job.model.params.items()
        },
        "params": None if lead.params is None else json.loads(lead.params),
        "fingerprint": None if lead.fingerprint is None else lead.fingerprint.hex(),
        "shared_with": [],
        "request": None,
        "other_questions": [],
    }


def _why_not_sent(job: Job, lead: Lead) -> str | None:
    if lead.error is not None or lead.status is not RowStatus.FILTERED:
        return lead.error
    blanks = {"", *job.model.placeholders}
    filled = [column for column in job.model.only_if_empty if clean(lead.cells.get(column, "")) not in blanks]
    if filled:
        return f"only_if_empty: {', '.join(filled)} has a value"
    return f"where: {job.model.where}" if job.model.where is not None else None


class Explainer(Struct, frozen=True):
    """Describes rows and requests from the history in the ledger. `is_running`: see `describe_next_step`."""

    job: Job
    template: RequestTemplate
    ledger: Database
    is_running: bool

    def explain_row(self, lead: Lead, rows_of: Mapping[bytes, list[int]]) -> dict[str, Any]:
        """Describe a row and its request. `rows_of` has the rows with each request, by fingerprint."""
        result = row_without_request(self.job, lead)
        if lead.fingerprint is None or lead.params is None:
            return result
        same_params = list(queries.find_by_params(self.ledger, lead.params))
        request = queries.find_request(self.ledger, lead.fingerprint)
        call = self.template.target.as_json()
        result["shared_with"] = [number for number in rows_of.get(lead.fingerprint, []) if number != lead.number]
        result["other_questions"] = [self.explain_request(other) for other in same_params if other.call != call]
        if request is not None:
            result["request"] = self.explain_request(request)
            # As in the output: the last found answer and this job's columns decide.
            state = State.FOUND if request.answer_id else request.state
            attempts = queries.attempts(self.ledger, request.id)
            state, why = self._judge(state, request.answer_id or request.attempt_id, attempts)
            status = RowStatus.from_state(state)
            if status is RowStatus.PENDING and lead.status is RowStatus.FILTERED:
                result["request"]["outlook"] = "not sent by the next run"
            else:
                result["status"], result["why"] = status, why
        return result

    def explain_request(self, request: RequestRow) -> dict[str, Any]:
        """Describe a request with all its attempts."""
        attempts = queries.attempts(self.ledger, request.id)
        policy, now_ms = self.job.model.policy, time.time_ns() // 1_000_000
        state, _ = self._judge(request.state, request.attempt_id, attempts)
        return {
            "fingerprint": request.fingerprint.hex(),
            "state": request.state,
            **request.call,
            "params": json.loads(request.params),
            "attempts": [_attempt_as_json(attempt) for attempt in attempts],
            "outlook": describe_next_step(state, attempts, policy, now_ms, is_running=self.is_running),
        }

    def _judge(self, stored: State, attempt_id: int | None, attempts: Sequence[AttemptRow]) -> tuple[State, str | None]:
        """Return the state that this job's columns give to the answer of an attempt, and the attempt's error."""
        attempt = next((attempt for attempt in attempts if attempt.id == attempt_id), None)
        if attempt is None or stored not in (State.FOUND, State.NOT_FOUND):
            return stored, None if attempt is None else attempt.error
        if attempt.answer is None:
            return stored, "the result was purged, and the request stays paid"
        parsed = parse_data(parse_json(attempt.answer).get("data"))
        is_match = has_value(parsed, self.template.columns.values())
        return State.FOUND if is_match else State.NOT_FOUND, attempt.error


def _attempt_as_json(attempt: AttemptRow) -> dict[str, Any]:
    answer = parse_data(parse_json(attempt.answer).get("data")).fields if attempt.answer else {}
    return {
        "attempt": attempt.id,
        "execution": attempt.execution_id,
        "job": attempt.job,
        "state": attempt.state,
        "intent_at": iso_time(attempt.claimed_ms),
        "task_id": attempt.task_id,
        "submitted_at": iso_time(attempt.submitted_ms),
        "settled_at": iso_time(attempt.settled_ms),
        "settled_in": attempt.settled_execution_id,
        "credits_reserved": to_credits(attempt.reserved),
        "credits": to_credits(attempt.credits),
        "together": attempt.bulk_size,
        "task_credits": to_credits(attempt.task_credits),
        "provider": attempt.provider,
        "error": attempt.error,
        "answer": dict(answer) or None,
    }


def describe_next_step(
    state: State, attempts: Sequence[AttemptRow], policy: Policy, now_ms: int, *, is_running: bool
) -> str:
    """Describe what happens next to a request. `is_running`: a run is using the ledger now."""
    last = next((attempt for attempt in reversed(attempts) if attempt.state != "refused"), None)
    match state:
        case State.PENDING:
            return f"the next run with this lead sends it{' again' if attempts else ''}"
        case State.SUBMITTING:
            if is_running:
                return "being sent now"
            return "was being sent when the last run ended: the next run marks it as unconfirmed"
        case State.SUBMITTED:
            expires = (last.submitted_ms or 0) + to_ms(policy.result_ttl) if last else 0
            may_be_gone = " and may have expired" if expires < now_ms else ""
            kept = f"the result is kept until about {iso_time(expires)}{may_be_gone}"
            return f"running at Databar; {kept}; the next run collects it"
        case State.FOUND | State.NOT_FOUND:
            age = policy.refresh.found if state is State.FOUND else policy.refresh.not_found
            if age is None or last is None:
                return f"final: the job has no policy.refresh for {state}"
            due = (last.settled_ms or 0) + to_ms(age)
            when = f"on {iso_time(due)}" if due > now_ms else "by the next run"
            return f"sent again {when}, by policy.refresh ({state}: {_format_duration(age)})"
        case State.FAILED | State.EXPIRED:
            lost = "marked as failed by --accept in_doubt; " if last and last.state == State.IN_DOUBT else ""
            return f"{lost}sent again only with --retry {state}, which may charge again"
        case State.IN_DOUBT:
            return "decide: --retry in_doubt sends it again (may charge twice), --accept in_doubt marks it as failed"


def _format_duration(age: timedelta) -> str:
    """Format a duration as in the job file, such as `90d` or `1h30m`."""
    hours, rest = divmod(age.seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    parts = ((age.days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


def row_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """Format a row with its request as text lines."""
    why = f", {row['why']}" if row["why"] else ""
    yield f"row {row['row']}: {row['status']}{why}"
    for param, cells in row["asks_with"].items():
        sent = (row["params"] or {}).get(param)
        source = "; ".join(f"{column}: {cell!r}" for column, cell in cells.items()) or "a constant"
        sent_text = repr(sent) if sent is not None else "nothing" if row["params"] is not None else "not sent"
        yield f"  {param:<11} {sent_text}  from {source}"
    if shared := row["shared_with"]:
        more = f" and {len(shared) - MAX_LEADS_SHOWN:,} more" if len(shared) > MAX_LEADS_SHOWN else ""
        yield f"  same request as row {', '.join(map(str, shared[:MAX_LEADS_SHOWN]))}{more}, charged once"
    if row["request"] is not None:
        yield from request_lines(row["request"])
    elif row["fingerprint"] is not None and row["status"] is not RowStatus.FILTERED:
        yield "  not sent yet; the next run sends it"
    for request in row["other_questions"]:
        yield "  other request for this lead (other target, providers or verifier):"
        yield from request_lines(request)


def request_lines(request: Mapping[str, Any]) -> Iterator[str]:
    """Format a request with its attempts as text lines."""
    yield f"  request {request['fingerprint']}: {_target_text(Target.from_json(request))}"
    yield f"    sent {json.dumps(request['params'], ensure_ascii=False)}"
    for number, attempt in enumerate(request["attempts"], start=1):
        yield f"    attempt {number} in run {attempt['execution']} of {attempt['job']}: {attempt['state']}"
        yield from (f"      {line}" for line in _attempt_lines(attempt))
    yield f"    {request['outlook']}"


def _target_text(target: Target) -> str:
    if target.kind is TargetKind.ENRICHMENT:
        return f"{target.title}{f', {target.pages:,} pages' if target.pages > 1 else ''}"
    verifier = "" if target.email_verifier is None else f", verifier {target.email_verifier}"
    return f"{target.title}, providers {', '.join(map(str, target.enrichments))}{verifier}"


def _attempt_lines(attempt: Mapping[str, Any]) -> Iterator[str]:
    yield f"{attempt['intent_at']}  recorded, at most {attempt['credits_reserved']:,.2f} credits reserved"
    if attempt["submitted_at"]:
        others = f", with {attempt['together'] - 1:,} others" if (attempt["together"] or 1) > 1 else ""
        yield f"{attempt['submitted_at']}  accepted as task {attempt['task_id']}{others}"
    if attempt["settled_at"]:
        price = _price_text(attempt)
        by = f", by {attempt['provider']}" if attempt["provider"] else ""
        within = attempt["settled_in"]
        where = f" in run {within}" if within not in (None, attempt["execution"]) else ""
        yield f"{attempt['settled_at']}  {attempt['state']}{where}, {price}{by}"
    if attempt["error"]:
        yield f"error: {attempt['error']}"
    for name, value in (attempt["answer"] or {}).items():
        plain = isinstance(value, str) and value.isprintable()
        yield f"{name}: {value if plain else json.dumps(value, ensure_ascii=False)}"


def _price_text(attempt: Mapping[str, Any]) -> str:
    if attempt["task_credits"] is not None:
        whole = f" for all {attempt['together']:,} of the task" if attempt["together"] > 1 else ""
        return f"{attempt['task_credits']:,.2f} credits{whole}"
    return "price unknown" if attempt["credits"] is None else f"{attempt['credits']:,.2f} credits"
