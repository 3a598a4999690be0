"""`enrich explain`: shows the full history of one lead, from the input and the ledger, without network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import click

from enrich.commands import options
from enrich.databar.answers import is_blank, parse_data, value_at
from enrich.job.job import Job
from enrich.job.spec import Policy
from enrich.ledger.database import ledger_exists
from enrich.ledger.forgotten import ForgottenRequests
from enrich.ledger.history import AttemptRow, LedgerReader, RequestRow
from enrich.ledger.ledger import Ledger
from enrich.ledger.lock import is_locked
from enrich.models import Call, RowStatus, State, iso_time, to_credits
from enrich.rows.lookup import (
    MAX_LEADS_SHOWN,
    Lead,
    find_by_cell,
    find_by_number,
    params_from_cell,
    parse_match,
    rows_by_request,
)
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate
from enrich.run.preflight import template_from_ledger


def explain_leads(job: Job, row: int | None, match: str | None) -> dict[str, Any]:
    """Return the object of `enrich explain --json` for a row, or for the rows that match `COLUMN=VALUE`.

    Raises JobError if the input has no such row or column, CommandRefused if the input cannot be read.
    """
    template, forgotten = _read_template(job)
    job_input = JobInput(job, forgotten)
    lookup_template = template or RequestTemplate(Call(job.model.waterfall, ()), (), (), {}, None)
    if match is not None:
        column, value = parse_match(match, job_input.columns)
        found = find_by_cell(job_input, lookup_template, column, value)
    else:
        found = find_by_number(job, job_input, lookup_template, row or 0)
    result: dict[str, Any] = {
        "job": job.name,
        "input": str(job.input_path),
        "ledger": str(job.ledger),
        "ever_ran": template is not None,
        "matches": found.count,
    }
    if template is None:
        return result | {"rows": [_row_without_request(job, lead) for lead in found.leads], "gone": []}
    with closing(LedgerReader(job.ledger)) as history:
        history.begin_snapshot()
        explainer = _Explainer(job, template, history, is_locked(job.ledger))
        candidates = list(history.find_by_any_param(params_from_cell(job, column, value))) if match is not None else []
        fingerprints = {lead.fingerprint for lead in found.leads if lead.fingerprint is not None}
        fingerprints |= {candidate.fingerprint for candidate in candidates}
        rows_of = rows_by_request(job_input, template, fingerprints)
        params_of_leads = {lead.params for lead in found.leads}
        missing = [
            known for known in candidates if known.fingerprint not in rows_of and known.params not in params_of_leads
        ]
        return result | {
            "rows": [explainer.explain_row(lead, rows_of) for lead in found.leads],
            "gone": [explainer.explain_request(known) for known in missing[:MAX_LEADS_SHOWN]],
        }


def _read_template(job: Job) -> tuple[RequestTemplate | None, ForgottenRequests | None]:
    """Return the request template and the forgotten requests of the ledger. No template: this job has never run."""
    if not ledger_exists(job.ledger):
        return None, None
    with closing(Ledger(job.ledger, read_only=True)) as ledger:
        waterfall = ledger.waterfall(job.model.waterfall)
        return None if waterfall is None else template_from_ledger(ledger, job), ledger.load_forgotten()


def _row_without_request(job: Job, lead: Lead) -> dict[str, Any]:
    """Describe a row that has no request in the ledger."""
    return {
        "row": lead.number,
        "status": lead.status or RowStatus.PENDING,
        "why": _why_not_sent(job, lead),
        "asks_with": _param_cells(job, lead),
        "params": None if lead.params is None else json.loads(lead.params),
        "fingerprint": None if lead.fingerprint is None else lead.fingerprint.hex(),
        "shared_with": [],
        "request": None,
        "other_questions": [],
    }


def _why_not_sent(job: Job, lead: Lead) -> str | None:
    if lead.error is not None or lead.status is not RowStatus.FILTERED:
        return lead.error
    filled = [column for column in job.model.only_if_empty if lead.cells.get(column, "").strip()]
    if filled:
        return f"only_if_empty: {', '.join(filled)} has a value"
    return f"where: {job.model.where}" if job.model.where is not None else None


def _param_cells(job: Job, lead: Lead) -> dict[str, dict[str, str]]:
    """Return the cells that each param may be filled from: param to column to cell."""
    return {
        name: {column: lead.cells[column] for column in param.columns if column in lead.cells}
        for name, param in job.model.params.items()
    }


@dataclass(frozen=True, slots=True)
class _Explainer:
    """Describes rows and requests from the history in the ledger. `is_running`: see `describe_next_step`."""

    job: Job
    template: RequestTemplate
    history: LedgerReader
    is_running: bool | None
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000

    def explain_row(self, lead: Lead, rows_of: Mapping[bytes, list[int]]) -> dict[str, Any]:
        result = _row_without_request(self.job, lead)
        if lead.fingerprint is None or lead.params is None:
            return result
        same_params = list(self.history.find_by_params(lead.params))
        request = self.history.find_request(lead.fingerprint)
        call = self.template.call.body() | {"waterfall": self.template.call.waterfall}
        result["shared_with"] = [number for number in rows_of.get(lead.fingerprint, []) if number != lead.number]
        result["other_questions"] = [self.explain_request(other) for other in same_params if other.call != call]
        if request is not None:
            result["request"] = self.explain_request(request)
            result["status"], result["why"] = self._row_status(request)
        return result

    def explain_request(self, request: RequestRow) -> dict[str, Any]:
        attempts = self.history.attempts(request.id)
        policy = self.job.model.policy
        return {
            "fingerprint": request.fingerprint.hex(),
            "state": request.state,
            **request.call,
            "params": json.loads(request.params),
            "attempts": [_attempt_as_json(attempt) for attempt in attempts],
            "outlook": describe_next_step(request.state, attempts, policy, self.now_ms(), is_running=self.is_running),
        }

    def _row_status(self, request: RequestRow) -> tuple[RowStatus, str | None]:
        """Return status and error of the row as in the output: the last found answer and this job's columns decide."""
        attempts = {attempt.id: attempt for attempt in self.history.attempts(request.id)}
        answered_attempt = attempts.get(request.answer_id or request.attempt_id or 0)
        state = State.FOUND if request.answer_id else request.state
        if answered_attempt is None or state not in (State.FOUND, State.NOT_FOUND):
            return RowStatus.from_state(state), None if answered_attempt is None else answered_attempt.error
        if answered_attempt.answer is None:
            return RowStatus.from_state(state), "its answer was purged; that it was paid for is remembered"
        fields = _answer_fields(answered_attempt)
        has = any(not is_blank(value_at(fields, path)) for path in self.template.columns.values())
        return RowStatus.FOUND if has else RowStatus.NOT_FOUND, answered_attempt.error


def _answer_fields(attempt: AttemptRow) -> Mapping[str, Any]:
    return parse_data(json.loads(attempt.answer).get("data")).fields if attempt.answer else {}


def _attempt_as_json(attempt: AttemptRow) -> dict[str, Any]:
    return {
        "attempt": attempt.id,
        "execution": attempt.execution_id,
        "job": attempt.job,
        "state": attempt.state,
        "intent_at": iso_time(attempt.claimed_ms),
        "task_id": attempt.task_id,
        "submitted_at": None if attempt.submitted_ms is None else iso_time(attempt.submitted_ms),
        "settled_at": None if attempt.settled_ms is None else iso_time(attempt.settled_ms),
        "settled_in": attempt.settled_execution_id,
        "credits_reserved": to_credits(attempt.reserved),
        "credits": to_credits(attempt.credits),
        "together": attempt.bulk_size,
        "task_credits": to_credits(attempt.task_credits),
        "provider": attempt.provider,
        "error": attempt.error,
        "answer": dict(_answer_fields(attempt)) or None,
    }


def describe_next_step(
    state: State, attempts: Sequence[AttemptRow], policy: Policy, now_ms: int, *, is_running: bool | None
) -> str:
    """Describe what happens next to a request. `is_running`: an execution holds the ledger now (None: unknown)."""
    last = next((attempt for attempt in reversed(attempts) if attempt.state != "refused"), None)
    match state:
        case State.PENDING:
            again = "asked again" if attempts else "asked"
            return f"will be {again} by the next run that wants it"
        case State.SUBMITTING:
            if is_running:
                return "is being sent right now"
            was = "was being sent" if is_running is False else "is being sent, or was"
            return f"{was} when the program ended: then the next run puts it in doubt"
        case State.SUBMITTED:
            expires = (last.submitted_ms or 0) + _to_ms(policy.result_ttl) if last else 0
            may_be_gone = " (so it may be gone)" if expires < now_ms else ""
            return (
                f"waits at the API, which keeps the result until about {iso_time(expires)}{may_be_gone}; "
                "the next run collects it"
            )
        case State.FOUND | State.NOT_FOUND:
            age = policy.refresh.found if state is State.FOUND else policy.refresh.not_found
            if age is None or last is None:
                return f"stays as it is: the job has no policy.refresh for {state}"
            due = (last.settled_ms or 0) + _to_ms(age)
            when = f"on {iso_time(due)}" if due > now_ms else "by the next run"
            return f"would be asked again {when}, by policy.refresh ({state}: {_format_duration(age)})"
        case State.FAILED | State.EXPIRED:
            lost = "taken for lost by --accept in_doubt; " if last and last.state == State.IN_DOUBT else ""
            return f"{lost}asked again, at a price, only by --retry {state}"
        case State.IN_DOUBT:
            return "yours to decide: --retry in_doubt asks again (may pay twice), --accept in_doubt takes it for lost"


def _to_ms(age: timedelta) -> int:
    return int(age.total_seconds() * 1000)


def _format_duration(age: timedelta) -> str:
    """Format a duration as in the job file, such as `90d` or `1h30m`."""
    hours, rest = divmod(age.seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    parts = ((age.days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


def format_explanation(result: Mapping[str, Any]) -> Iterator[str]:
    """Format the object of `explain_leads` as text lines."""
    if not result["ever_ran"]:
        yield f"{result['job']} has never run: nothing was ever asked ({result['ledger']})"
    if result["matches"] > MAX_LEADS_SHOWN:
        yield f"{result['matches']:,} rows match; the first {MAX_LEADS_SHOWN}:"
    for row in result["rows"]:
        yield from _row_lines(row)
    if not result["rows"]:
        yield f"no row of {result['input']} matches"
    for request in result["gone"]:
        yield "not in the input any more, but in the ledger:"
        yield from _request_lines(request)


def _row_lines(row: Mapping[str, Any]) -> Iterator[str]:
    why = f", {row['why']}" if row["why"] else ""
    yield f"row {row['row']}: {row['status']}{why}"
    for param, cells in row["asks_with"].items():
        sent = (row["params"] or {}).get(param)
        of = "; ".join(f"{column}: {cell!r}" for column, cell in cells.items()) or "a constant"
        sent_text = repr(sent) if sent is not None else "nothing" if row["params"] is not None else "not asked"
        yield f"  {param:<12}{sent_text}  from {of}"
    if shared := row["shared_with"]:
        more = f" and {len(shared) - MAX_LEADS_SHOWN:,} more" if len(shared) > MAX_LEADS_SHOWN else ""
        yield f"  the same is asked by row {', '.join(map(str, shared[:MAX_LEADS_SHOWN]))}{more}; paid once"
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
        price = _price_text(attempt)
        by = f", by {attempt['provider']}" if attempt["provider"] else ""
        within = attempt["settled_in"]
        where = f" in execution {within}" if within not in (None, attempt["execution"]) else ""
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
    return "price not known" if attempt["credits"] is None else f"{attempt['credits']:,.2f} credits"


@click.command()
@options.job_options(has_input=True)
@click.option("--row", type=click.IntRange(min=1), metavar="N", help="This row of the input; 1 is the first lead.")
@click.option("--match", metavar="COLUMN=VALUE", help="The rows with this value, whatever the case of its letters.")
@options.JSON_OPTION
def explain(
    job_options: options.JobOptions,
    row: int | None,
    match: str | None,
    as_json: bool,
) -> None:
    """Tell everything that ever happened to one lead of JOB, without network."""
    if (row is None) == (match is None):
        raise click.UsageError('say which lead: --row N or --match "Email=ada@engine.example"')
    result = explain_leads(job_options.load(), row, match)
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(format_explanation(result)))
