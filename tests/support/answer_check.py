"""Compares each row's answer with the sandbox's answer for that lead, and finds rows that differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from enrich.sandbox import SandboxSettings
from enrich.sandbox.answers import SeededRandom, invent_fields, make_answer
from enrich.sandbox.catalogue import ENRICHMENTS, WATERFALLS
from enrich.sandbox.lookups import EnrichmentCall, Lookup, make_cascade
from tests.support.workspace import lead_name

#: Statuses that count as an answer. Nothing expires here: `expired` would be a loss.
ANSWER_STATUSES = frozenset({"found", "not_found", "failed"})
#: The row status for each outcome of the sandbox, after the last free failure.
_STATUS_BY_OUTCOME = {"found": "found", "missed": "not_found", "no_data": "not_found", "failed": "failed"}
_LAST_ATTEMPT = 10


def misassigned_rows(
    rows: Iterable[Mapping[str, str]],
    audit: Mapping[str, Any],
    settings: SandboxSettings,
    *,
    bulk: bool = False,
    column: str | None = "work_email",
) -> dict[str, str]:
    """Return the leads whose row has another lead's answer: first name to what is wrong.

    `column` is the column with the email, None if there is none. A row without an answer is never wrong.
    """
    runs = {lead_name(run["params"]): run for run in audit["runs"]}
    wrong = {}
    for row in rows:
        name, status = row["First Name"], row["enrich_status"]
        if status not in ANSWER_STATUSES or not (task_id := row["enrich_task_id"]):
            continue
        if name not in runs or task_id not in runs[name]["task_ids"]:
            wrong[name] = f"its task is another's: {task_id}"
            continue
        expected, email = _expected_answer(runs[name], settings, bulk=bulk)
        # A failure at no charge may have been the last one allowed; in bulk, a failure may look like a miss.
        if status != "failed" and (status == "found") != (expected == "found"):
            wrong[name] = f"{status}, not {expected}"
        elif status == "found" and column and row[column] != email:
            wrong[name] = f"{row[column]}, not {email}"
    return wrong


def _expected_answer(run: Mapping[str, Any], settings: SandboxSettings, *, bulk: bool) -> tuple[str, str]:
    """Return the status and the email, or the phone, that the sandbox has for a run of its audit."""
    is_waterfall = "waterfall" in run
    template = Lookup(
        make_cascade(WATERFALLS[run["waterfall"]], run["enrichments"], run["email_verifier"])
        if is_waterfall
        else EnrichmentCall(ENRICHMENTS[run["enrichment"]], run["pages"]),
        run["params"],
    )
    draw = SeededRandom(settings.seed, template.subject)
    outcome = make_answer(template, _LAST_ATTEMPT, draw, settings, bulk=bulk).outcome
    fields = invent_fields(run["waterfall"] if is_waterfall else str(run["enrichment"]), run["params"], draw)
    return _STATUS_BY_OUTCOME[outcome], fields["email" if is_waterfall else "phone"]
