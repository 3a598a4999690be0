"""Decides again about answers that are due for a refresh, but were judged by other columns than the job has today.

Whether an answer is a match was decided with the columns of the run that sent its request. `policy.refresh` has an age
for matches and one for no matches, and means those of today's columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from enrich.databar.task_results import has_value, makes_match, parse_data
from enrich.json_text import parse_json, to_json_text
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS
from enrich.ledger.execution_records import read_paths
from enrich.models import Decision, RequestSelection, State


class JudgedAnswer(NamedTuple):
    """The state of a request by today's columns, and when its newest attempt was settled (ms)."""

    state: State
    settled_ms: int

    def decision(self, selection: RequestSelection) -> Decision:
        """Return whether the request is due for a refresh, else its state."""
        before_ms = selection.refresh_before_ms.get(self.state)
        is_due = before_ms is not None and self.settled_ms < before_ms
        return Decision.REFRESH if is_due else Decision(self.state.value)


def review_refreshes(db: Database, selection: RequestSelection, paths: Iterable[str], *, keep_matches: bool) -> None:
    """Decide again about the requests of this pass that are due for a refresh. Call it when the input was read.

    `paths` are the job's columns. `keep_matches`: a match of today that was none then stands until a newer one comes.
    """
    if not selection.refresh_before_ms:
        return
    due = [number for (number,) in db.execute("SELECT id FROM seen WHERE decision = 'refresh'")]
    judged = judge_answers(db, due, paths)
    decisions = [(answer.decision(selection).value, number) for number, answer in judged.items()]
    matches = [number for number, answer in judged.items() if answer.state is State.FOUND]
    with db.temporary_transaction():
        db.executemany("UPDATE seen SET decision = ? WHERE id = ?", decisions)
    if keep_matches and matches:
        db.execute(
            "UPDATE requests SET answer_id = attempt_id "
            f"WHERE answer_id IS NULL AND id IN ({JSON_NUMBERS.format('?')})",
            (to_json_text(matches),),
        )


def judge_answers(db: Database, request_ids: Sequence[int], paths: Iterable[str]) -> Mapping[int, JudgedAnswer]:
    """Judge those of the requests whose stored answer was judged by other columns."""
    columns, ids = frozenset(filter(makes_match, paths)), to_json_text(list(request_ids))
    others = _executions_with_other_columns(db, ids, columns) if request_ids else set()
    if not others:
        return {}
    rows = db.execute(
        "SELECT r.id, s.answer, a.settled_ms, a.step, e.paths FROM requests r JOIN attempts a ON a.id = r.attempt_id "
        "JOIN executions e ON e.id = a.execution_id JOIN attempts s ON s.id = coalesce(r.answer_id, r.attempt_id) "
        f"WHERE r.id IN ({JSON_NUMBERS.format('?1')}) AND e.id IN ({JSON_NUMBERS.format('?2')}) "
        "AND s.answer IS NOT NULL",
        (ids, to_json_text(sorted(others))),
    )
    judged = {}
    for request_id, answer, settled_ms, step, stored_paths in rows:
        if _columns_of(stored_paths, step) != columns:
            is_match = has_value(parse_data(parse_json(answer).get("data")), columns)
            judged[request_id] = JudgedAnswer(State.FOUND if is_match else State.NOT_FOUND, settled_ms)
    return judged


def _executions_with_other_columns(db: Database, ids: str, columns: Collection[str]) -> set[int]:
    """Return the runs that sent the newest attempts of requests (a JSON list of ids) and had other columns."""
    rows = db.execute(
        "SELECT DISTINCT e.id, e.paths, a.step FROM requests r JOIN attempts a ON a.id = r.attempt_id "
        f"JOIN executions e ON e.id = a.execution_id WHERE r.id IN ({JSON_NUMBERS.format('?')})",
        (ids,),
    )
    return {execution for execution, paths, step in rows if _columns_of(paths, step) != columns}


def _columns_of(paths: str, step: str | None) -> frozenset[str]:
    return frozenset(filter(makes_match, read_paths(paths, step)))
