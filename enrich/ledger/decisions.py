"""Finds the ids of the requests of a batch, and decides which of them are sent.

`policy.refresh` has one age for matches and one for no matches. The state in the ledger is that by the columns of the
run that sent the request. With the columns that the job has today, the same answer may be a match or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from enrich.databar.task_results import has_value, makes_match, parse_data
from enrich.json_text import parse_json, to_json_text
from enrich.ledger.database import Database
from enrich.ledger.dialect import JSON_NUMBERS, OPEN_ATTEMPT
from enrich.models import Decision, RequestBatch, RequestSelection, State

#: This many requests more than a batch has are compared with it, because some of them may have left the file.
_WINDOW_EXTRA = 1_000
#: The distinct requests of a batch: ?1 is a list with the id of each row's request, or 0, ?2 the first row's position.
BATCH = (
    "(SELECT CAST(value AS BIGINT) AS id, CAST(?2 AS BIGINT) + key AS position "
    "FROM json_each(CAST(?1 AS TEXT)) WHERE CAST(value AS BIGINT) <> 0) AS b"
)
#: Key and value of a list of fingerprints: ?1 has a number for each, ?2 their bytes.
FINGERPRINT = "substr(?2, CAST(16 * key + 1 AS INTEGER), 16)"


def find_ids(db: Database, batch: RequestBatch) -> Sequence[int | None]:
    """Return the ids of the requests of a batch; None: neither the ledger nor this pass has the request.

    The requests of a file are in the ledger nearly in the file's order. So those that follow the last batch are
    compared with the batch, which is much faster than looking up each of a million fingerprints.
    """
    # A request keeps its negative id for the whole pass, even if another process enrolls it meanwhile.
    has_unknown = db.exists("FROM unknown_requests")
    if batch.ids is not None:
        if not has_unknown:
            db.matched_up_to = batch.ids[-1] if batch.ids else db.matched_up_to
            return batch.ids
        assert batch.complete is not None  # noqa: S101 - it is set with the ids
        batch = batch.complete().distinct()
    fingerprints = batch.fingerprints
    following: dict[bytes, int] = {}
    # Processes that share a pass enroll parts of a file in any order.
    if not db.shares_passes:
        query = "SELECT fingerprint, id FROM requests WHERE id > ? ORDER BY id LIMIT ?"
        following.update(db.execute(query, (db.matched_up_to, len(fingerprints) + _WINDOW_EXTRA)))
    ids = list(map(following.get, fingerprints))
    if missing := without_id(fingerprints, ids):
        found = ids_in(db, "requests", missing)
        ids = [found.get(name, number) for name, number in zip(fingerprints, ids, strict=True)]
    db.matched_up_to = next(filter(None, reversed(ids)), db.matched_up_to)
    if has_unknown:
        unknown = unknown_ids(db, fingerprints)
        ids = [unknown.get(name, number) for name, number in zip(fingerprints, ids, strict=True)]
    return ids


def without_id(fingerprints: Sequence[bytes], ids: Sequence[int | None]) -> list[bytes]:
    """Return the requests whose id is not known."""
    if None not in ids:
        return []
    return [name for name, number in zip(fingerprints, ids, strict=True) if number is None]


def add_ids(ids: Sequence[int | None], fingerprints: Sequence[bytes], new: Mapping[bytes, int]) -> list[int | None]:
    """Return the ids, with the new ones of all requests that had none."""
    return [new[name] if number is None else number for name, number in zip(fingerprints, ids, strict=True)]


def ids_in(db: Database, table: str, fingerprints: Sequence[bytes]) -> dict[bytes, int]:
    """Look up requests in a table. Return the ids of those it has."""
    rows = db.execute(
        f"SELECT t.fingerprint, t.id FROM json_each(CAST(?1 AS TEXT)) CROSS JOIN {table} t "
        f"WHERE t.fingerprint = {FINGERPRINT}",
        as_list(fingerprints),
    )
    return dict(rows)


def unknown_ids(db: Database, fingerprints: Sequence[bytes]) -> dict[bytes, int]:
    """Return the ids of requests that are not in the ledger, but were seen in this pass. They are negative."""
    return {name: -number for name, number in ids_in(db, "unknown_requests", fingerprints).items()}


def as_list(fingerprints: Collection[bytes], numbers: Iterable[int] | None = None) -> tuple[str, bytes]:
    """Return ?1 and ?2 of statements about many requests: a list with a number for each, and their fingerprints."""
    return to_json_text([0] * len(fingerprints) if numbers is None else list(numbers)), b"".join(fingerprints)


def batch_parameters(batch: RequestBatch, ids: Sequence[int | None]) -> tuple[str, int]:
    """Return the two SQL parameters of `BATCH`."""
    positions = batch.positions
    if isinstance(positions, range) and None not in ids:
        return to_json_text(ids), positions.start
    first, last = min(positions, default=0), max(positions, default=-1)
    listed = [0] * (last - first + 1)
    for position, number in zip(positions, ids, strict=True):
        listed[position - first] = number or 0
    return to_json_text(listed), first


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


def find_known_batch(db: Database, job: str, position: int, digest: bytes) -> str | None:
    """Return what was stored (JSON) for the batch at a position of a job's input.

    None: nothing, the batch has another digest now, or the content is damaged. It can be computed again.
    """
    with db.temporary_transaction():
        row = db.execute(
            "SELECT content, digest FROM known_batches WHERE job = ? AND position = ?", (job, position)
        ).fetchone()
    return row[0] if row is not None and row[1] == _content_digest(digest, row[0]) else None


def store_known_batch(db: Database, job: str, rows: range, digest: bytes, content: str) -> None:
    """Store what is known (JSON) of the batch with these rows. It replaces batches that begin in it."""
    delete = "DELETE FROM known_batches WHERE job = ? AND position >= ? AND position < ?"
    db.execute(delete, (job, rows.start, rows.stop))
    stored = (job, rows.start, _content_digest(digest, content), content)
    db.execute("INSERT INTO known_batches VALUES (?, ?, ?, ?)", stored)


def _content_digest(digest: bytes, content: str) -> bytes:
    """Return the digest of a batch together with what is stored of it."""
    return blake2b(content.encode(errors="replace"), digest_size=16, key=digest).digest()


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
