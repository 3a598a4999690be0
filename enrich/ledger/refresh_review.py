"""Decides about refreshes by the columns that the job has today.

`policy.refresh` has one age for matches and one for no matches. The state in the ledger is that by the columns of the
run that sent the request. With other columns, the same answer may be a match or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from enrich.databar.task_results import has_value, makes_match, parse_data
from enrich.json_text import parse_json, to_json_text
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS
from enrich.models import Decision, RequestSelection, State

#: Answers that are read at once.
REQUESTS_PER_STEP = 5_000
#: Decisions about requests with an answer. The stored state decides until the answer is judged by today's columns.
ANSWERED = (Decision.FOUND, Decision.NOT_FOUND, Decision.REFRESH)


class JudgedAnswer(NamedTuple):
    """The state of a request by today's columns, and when its newest attempt was settled (ms)."""

    state: State
    settled_ms: int

    def decision(self, selection: RequestSelection) -> Decision:
        """Return whether the request is due for a refresh, else its state."""
        before_ms = selection.refresh_before_ms.get(self.state)
        is_due = before_ms is not None and self.settled_ms < before_ms
        return Decision.REFRESH if is_due else Decision(self.state.value)


def review_refreshes(
    db: Database,
    selection: RequestSelection,
    paths: Iterable[str],
    *,
    keep_matches: bool,
    check_stopped: Callable[[], None] = lambda: None,
) -> None:
    """Decide again about the requests of this pass that have an answer. Call it when the input was read.

    `paths` are the job's columns. With `keep_matches`, an answer that has become a match by them is stored as the match
    of its request, until a newer one comes. `check_stopped` is called often and may raise to end the review.
    """
    columns = list(paths)
    if not selection.refresh_before_ms or _runs_with_columns(db, columns) is None:
        return
    answered = ", ".join(f"'{decision.value}'" for decision in ANSWERED)
    ids = [number for (number,) in db.execute(f"SELECT id FROM seen WHERE decision IN ({answered}) ORDER BY id")]
    for start in range(0, len(ids), REQUESTS_PER_STEP):
        check_stopped()
        judged = judge_answers(db, ids[start : start + REQUESTS_PER_STEP], selection, columns)
        with db.temporary_transaction():
            decisions = [(answer.decision(selection).value, number) for number, answer in judged.items()]
            db.executemany("UPDATE seen SET decision = ? WHERE id = ?", decisions)
        matches = [number for number, answer in judged.items() if answer.state is State.FOUND]
        if keep_matches and matches:
            db.execute(
                "UPDATE requests SET answer_id = attempt_id "
                f"WHERE answer_id IS NULL AND id IN ({JSON_NUMBERS.format('?')})",
                (to_json_text(matches),),
            )


def judge_answers(
    db: Database, request_ids: Sequence[int], selection: RequestSelection, paths: Iterable[str]
) -> Mapping[int, JudgedAnswer]:
    """Judge those of the requests whose newest answer was judged by other columns and may be due for a refresh."""
    columns = list(paths)
    if not request_ids or not selection.refresh_before_ms:
        return {}
    runs = _runs_with_columns(db, columns)
    if runs is None:
        return {}
    rows = db.execute(
        "SELECT r.id, a.answer, a.settled_ms FROM requests r JOIN attempts a ON a.id = r.attempt_id "
        f"WHERE r.id IN ({JSON_NUMBERS.format('?1')}) AND a.answer IS NOT NULL AND a.settled_ms < ?3 "
        "AND a.execution_id <> coalesce(CAST(?4 AS BIGINT), 0) AND (a.execution_id, coalesce(a.step, '')) NOT IN "
        "(SELECT CAST(value->>0 AS BIGINT), value->>1 FROM json_each(CAST(?2 AS TEXT)))",
        (
            to_json_text(list(request_ids)),
            to_json_text(runs),
            max(selection.refresh_before_ms.values()),
            selection.sent_in,
        ),
    )
    return {
        number: JudgedAnswer(
            State.FOUND if has_value(parse_data(parse_json(answer).get("data")), columns) else State.NOT_FOUND,
            settled_ms,
        )
        for number, answer, settled_ms in rows
    }


def _runs_with_columns(db: Database, paths: Iterable[str]) -> Sequence[tuple[int, str]] | None:
    """Return the runs that had these columns, each with the step that had them ("": no steps). None: all runs had."""
    columns = set(filter(makes_match, paths))
    judged_alike: dict[tuple[int, str], bool] = {}
    for execution, text in db.execute("SELECT id, paths FROM executions"):
        paths_by_step = known if isinstance(known := parse_json(text), dict) else {"": known}
        for step, step_paths in paths_by_step.items():
            judged_alike[execution, step] = set(filter(makes_match, step_paths)) == columns
    return None if all(judged_alike.values()) else [run for run, is_alike in judged_alike.items() if is_alike]
