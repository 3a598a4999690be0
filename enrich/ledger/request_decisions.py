"""Decides in SQL whether a request is to be sent, by its state and by the selection of the run."""

from __future__ import annotations

from enrich.ledger.sql_fragments import OPEN_ATTEMPT
from enrich.models import Decision, RequestSelection, State


def decision_sql(selection: RequestSelection) -> str:
    """Return the SQL for the decision about a request before the whole input was read."""
    newest = "EXISTS (SELECT 1 FROM attempts a WHERE a.id = r.attempt_id AND {})".format
    cases: dict[str, Decision] = {}
    if selection.after_execution is not None:
        settled = newest(
            f"a.settled_execution_id > {selection.after_execution:d} AND a.execution_id <= "
            f"{selection.after_execution:d}"
        )
        # Requests that were waiting when the plan was saved are not among those it counted to be sent.
        cases[f"r.state = 'pending' AND {settled}"] = Decision.WAITING
        cases[f"r.state <> 'pending' AND {newest(f'a.execution_id > {selection.after_execution:d}')}"] = (
            Decision.PLANNED
        )
        cases |= {f"r.state = '{state}' AND {settled}": Decision(state.value) for state in selection.retry}
    cases["r.state IS NULL OR r.state = 'pending'"] = Decision.NEW
    if selection.no_active_run:
        # The next run starts by marking these `in_doubt`.
        is_retried = State.IN_DOUBT in selection.retry
        cases["r.state = 'submitting'"] = Decision.RETRY if is_retried else Decision.IN_DOUBT
    cases[f"r.{OPEN_ATTEMPT}"] = Decision.WAITING
    if selection.sent_in is not None:
        sent = newest(f"a.execution_id = {selection.sent_in:d}")
        cases |= {f"r.state = '{state}' AND {sent}": Decision(state.value) for state in selection.sent_again}
    cases |= {f"r.state = '{state}'": Decision.RETRY for state in selection.retry}
    for state, before_ms in selection.refresh_before_ms.items():
        cases[f"r.state = '{state}' AND {newest(f'a.settled_ms < {before_ms:d}')}"] = Decision.REFRESH
    return "CASE " + "".join(f"WHEN {case} THEN '{name}' " for case, name in cases.items()) + "ELSE r.state END"
