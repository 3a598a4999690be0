"""Imports rescue files: paid results that could not be written to the ledger. The next run imports and removes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from enrich.errors import CommandRefused
from enrich.ledger import records, resume, transitions
from enrich.ledger.database import Database
from enrich.ledger.dialect import OPEN_ATTEMPT
from enrich.ledger.records import newest_execution_id, start_execution
from enrich.ledger.rescue_file import RescuedAttempt, read_own_rescue_files
from enrich.models import Answer, State

SETTLED_STATES = ("found", "not_found", "failed", "expired")
_BEST_STATE_FIRST = ("found", "not_found", "submitted", "failed", "expired", "in_doubt", "submitting")
_UNKNOWN_ANSWER_ERROR = "the ledger could not be written, and the response to the request is unknown"


class RescueImport(Struct, frozen=True):
    """How many attempts of a rescue file now have each state in the ledger. `known`: the ledger already had them."""

    submitted: int = 0
    in_doubt: int = 0
    answered: int = 0
    refused: int = 0
    known: int = 0

    def __str__(self) -> str:
        parts = [
            (self.submitted, "tasks to fetch"),
            (self.answered, "answers"),
            (self.in_doubt, "unconfirmed requests (in_doubt)"),
            (self.refused, "requests that were not accepted"),
            (self.known, "already in the ledger"),
        ]
        return ", ".join(f"{count} {label}" for count, label in parts if count) or "nothing new"


def import_rescue_files(
    ledger: Database, other_folders: Sequence[Path], job: str, now_ms: int
) -> list[tuple[Path, RescueImport]]:
    """Import the rescue files of a ledger in the caller's transaction. The caller removes them after its commit.

    `other_folders` are the folders besides the ledger's where one may be. Raises CommandRefused for a damaged file.
    """
    location = ledger.location
    if not isinstance(location, Path):
        return []
    imported = []
    for path, lines in read_own_rescue_files(location, other_folders).items():
        try:
            imported.append((path, import_rescued(ledger, lines, job, now_ms)))
        except CommandRefused as error:
            raise CommandRefused(f"{path}: {error.message}", error.hint) from error
    return imported


def remove_imported_files(imported: Iterable[tuple[Path, RescueImport]]) -> None:
    """Remove the imported files. Raises CommandRefused for one that cannot be removed."""
    for path, _ in imported:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CommandRefused(
                f"{path}: the rescue file cannot be removed: {error.strerror}", "remove it yourself"
            ) from error


def import_and_remove(ledger: Database, other_folders: Sequence[Path], job: str, now_ms: int) -> None:
    """Import the rescue files of a ledger in a transaction of their own, and remove them. Raises CommandRefused."""
    with ledger.transaction():
        imported = import_rescue_files(ledger, other_folders, job, now_ms)
    remove_imported_files(imported)


def import_rescued(db: Database, lines: Sequence[RescuedAttempt], job: str, now_ms: int) -> RescueImport:
    """Import the attempts of a rescue file. Data that the ledger already has stays, so an import can be repeated.

    Raises CommandRefused when they belong to another API host or workspace.
    """
    _check_binding(db, lines)
    rows_per_bulk_task = Counter(line.bulk_task for line in lines if line.task_id is not None)
    return RescueImport(**_Import(db, job, now_ms, rows_per_bulk_task).run(lines))


def _check_binding(db: Database, lines: Sequence[RescuedAttempt]) -> None:
    for name in ("api_host", "workspace"):
        values = {getattr(line, name) for line in lines} | {records.read_fact(db, name)}
        if len(values - {None}) > 1:
            raise CommandRefused(
                f"the rescue file belongs to another {name.replace('_', ' ')} than this ledger",
                "move it away, or use the `ledger:` that it was written for",
            )


@dataclass(slots=True)
class _Import:
    """The import of the lines of a rescue file."""

    db: Database
    job: str
    now_ms: int
    #: The number of lines with a task id, by their bulk task.
    rows_per_bulk_task: Counter[int | None]
    #: The number of lines by what became of them.
    counts: Counter[str] = field(default_factory=Counter)
    #: The records of the runs that made the inserted attempts, by the columns of their jobs.
    execution_ids: dict[tuple[str, ...], int] = field(default_factory=dict)

    def run(self, lines: Sequence[RescuedAttempt]) -> Counter[str]:
        """Import the lines. Return their number by what became of them."""
        rest = [line for line in lines if not self._update_existing(line) and line.state != "refused"]
        known = self.counts.total() + len(rest)
        # A killed run left attempts in `submitting`. Mark them `in_doubt` before their requests get another attempt.
        resume.recover(self.db, self.now_ms)
        # In the order in which they were sent, because a request may have several attempts. A bulk task is one POST.
        posts: dict[tuple[int | None, int | None], dict[str, RescuedAttempt]] = {}
        for line in sorted(rest, key=lambda line: (line.claimed_ms, self._rank(line))):
            post = (None, line.attempt) if line.bulk_task is None else (line.bulk_task, None)
            posts.setdefault(post, {}).setdefault(line.fingerprint, line)
        for lines_of_post in posts.values():
            self._insert_post(list(lines_of_post.values()))
        self.counts["known"] += known - self.counts.total()
        self.db.execute(
            "UPDATE executions SET reserved = (SELECT max(executions.reserved, coalesce(sum(reserved), 0)) "
            f"FROM attempts WHERE {OPEN_ATTEMPT}) WHERE id = (SELECT max(id) FROM executions)"
        )
        return self.counts

    def _update_existing(self, line: RescuedAttempt) -> bool:
        """Update the attempt that a line describes. Return False when the ledger does not have it."""
        db, now_ms, counts = self.db, self.now_ms, self.counts
        row = db.execute(
            "SELECT a.id, a.state, a.task_id, a.execution_id, r.attempt_id = a.id, a.bulk_task_id IS NOT NULL, "
            "EXISTS (SELECT 1 FROM attempts o JOIN requests s ON s.id = o.request_id WHERE o.bulk_task_id = "
            "a.bulk_task_id AND s.attempt_id <> o.id) FROM attempts a JOIN requests r ON r.id = a.request_id "
            "WHERE r.fingerprint = ? AND a.claimed_ms = ? ORDER BY a.id DESC LIMIT 1",
            (bytes.fromhex(line.fingerprint), line.claimed_ms),
        ).fetchone()
        if row is None or (None not in (row[2], line.task_id) and row[2] != line.task_id):
            return False
        attempt_id, state, _, execution_id, is_newest, is_bulk, is_sent_again = row
        fetchable = is_newest and bool(is_bulk) == (line.bulk_task is not None) and not self._is_in_doubt(line)
        # Without all of its requests, a bulk task is not polled again.
        has_all_rows = self.rows_per_bulk_task[line.bulk_task] == line.size and not is_sent_again
        is_whole = line.bulk_task is None or has_all_rows
        if state in ("submitting", "in_doubt") and fetchable and line.task_id is not None:
            if not is_whole:
                return False  # the answers of a bulk task become attempts of their own
            _mark_submitted(db, attempt_id, execution_id, line, already_counted=state == "in_doubt")
            counts["answered" if _settle_if_answered(db, attempt_id, execution_id, line) else "submitted"] += 1
        elif state == "submitted" and is_newest and _settle_if_answered(db, attempt_id, newest_execution_id(db), line):
            counts["answered"] += 1  # in the last run, which may have polled the task of an earlier one
        elif state == "submitting" and line.state == "refused":
            transitions.record_refused(db, [(attempt_id, line.error or "not accepted", now_ms)])
            counts["refused"] += 1
        elif state == "submitting" and line.state == "failed" and line.task_id is None:
            transitions.record_rejected(db, [(attempt_id, line.error or "not accepted", now_ms)])
            counts["refused"] += 1
        elif state == "submitting":
            task_id = line.task_id if is_whole else None
            transitions.mark_in_doubt(db, [(attempt_id, line.error or _UNKNOWN_ANSWER_ERROR, now_ms, task_id)])
            counts["in_doubt"] += 1
        else:
            counts["known"] += 1
        return True

    def _insert_post(self, lines: Sequence[RescuedAttempt]) -> None:
        """Insert the attempts of one POST that the ledger does not have."""
        db = self.db
        found = [(line, _find_or_create_request(db, line)) for line in lines]
        new_lines = [(line, request) for line, request in found if self._adds_to_ledger(line, request)]
        # The answers of a bulk task are assigned by index: without all of its requests, none can be assigned.
        is_whole = sum(line.state == "submitted" for line, _ in new_lines) == (lines[0].size or 1)
        bulk_task_id: int | None = None
        for line, request in new_lines:
            if request.state == "submitted" and request.attempt_id is not None:
                transitions.mark_in_doubt(db, [(request.attempt_id, "a newer attempt was sent", self.now_ms, None)])
            is_partial = line.state == "submitted" and not is_whole
            state = "in_doubt" if is_partial or self._is_in_doubt(line) else line.state
            if line.bulk_task is not None and state == "submitted" and bulk_task_id is None:
                insert = "INSERT INTO bulk_tasks (execution_id, size) VALUES (?, ?) RETURNING id"
                bulk_task_id = db.number(insert, self._execution_id(line), line.size)
            self._insert_attempt(line, request, state, bulk_task_id if state == "submitted" else None)
            self.counts[state if state in ("submitted", "in_doubt") else "answered"] += 1

    def _insert_attempt(
        self, line: RescuedAttempt, request: _RequestState, state: str, bulk_task_id: int | None
    ) -> None:
        """Insert the attempt of a line in this state. It becomes the newest of its request."""
        db, execution_id, is_settled = self.db, self._execution_id(line), state in SETTLED_STATES
        columns = {
            "request_id": request.id,
            "execution_id": execution_id,
            "previous_state": request.state,
            "previous_id": request.attempt_id,
            "state": state,
            "task_id": line.task_id,
            "claimed_ms": line.claimed_ms,
            "submitted_ms": line.submitted_ms,
            "settled_ms": None if state == "submitted" else line.settled_ms or line.claimed_ms,
            "settled_execution_id": execution_id if is_settled else None,
            "acknowledged": int(line.acknowledged),
            "reserved": line.reserved,
            "credits": line.credits if is_settled else None,
            "provider": line.provider,
            "error": line.error or (_UNKNOWN_ANSWER_ERROR if state == "in_doubt" else None),
            "answer": line.answer if is_settled else None,
            "bulk_task_id": bulk_task_id,
            "bulk_index": None if bulk_task_id is None else line.bulk_index,
            "step": line.step,
            # A row of a bulk task is not polled alone: it would get the answer of the first row.
            "gone": int(line.bulk_task is not None and bulk_task_id is None),
        }
        insert = f"INSERT INTO attempts ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) RETURNING id"
        attempt_id = db.number(insert, *columns.values())
        db.execute(
            "UPDATE requests SET state = ?1, attempt_id = ?2, attempt_count = attempt_count + 1, "
            "queue_position = NULL, answer_id = CASE WHEN ?1 = 'found' THEN ?2 ELSE answer_id END WHERE id = ?3",
            (state, attempt_id, request.id),
        )
        db.execute(
            "UPDATE executions SET reserved = reserved + ?, spent = spent + ?, unknown = unknown + ?, "
            "submitted = submitted + ? WHERE id = ?",
            (
                0 if is_settled and line.credits is not None else line.reserved,
                (line.credits or 0) if is_settled else 0,
                int(is_settled and line.credits is None),
                int(line.submitted_ms is not None),
                execution_id,
            ),
        )
        if line.task_id is not None:
            records.bind(db, {"api_host": line.api_host, "workspace": line.workspace})

    def _execution_id(self, line: RescuedAttempt) -> int:
        """Return the record of the run that made an attempt: one without a summary for all of the same columns."""
        paths = tuple(line.paths)
        if paths not in self.execution_ids:
            execution_id = start_execution(self.db, self.job, None, line.claimed_ms, paths=paths)
            ended = "UPDATE executions SET ended_ms = ?, exit_code = 1 WHERE id = ?"
            self.db.execute(ended, (self.now_ms, execution_id))
            self.execution_ids[paths] = execution_id
        return self.execution_ids[paths]

    def _adds_to_ledger(self, line: RescuedAttempt, request: _RequestState) -> bool:
        """Return whether a line adds to what the ledger has about its request."""
        if line.task_id is not None and self.db.exists(
            "FROM attempts WHERE request_id = ? AND task_id = ?", request.id, line.task_id
        ):
            return False
        if request.state == "pending" or (request.state == "in_doubt" and not self._is_in_doubt(line)):
            return True
        # An older copy of the ledger lacks what was sent after the answer that it has. The rows of a bulk task that
        # waits for its answer stay together.
        is_bulk = request.state == "submitted" and request.is_bulk
        return line.claimed_ms > request.claimed_ms and not is_bulk

    def _rank(self, line: RescuedAttempt) -> int:
        """Return the rank of a line among those of the same time: an answer, a task, an unconfirmed attempt."""
        return _BEST_STATE_FIRST.index("in_doubt" if self._is_in_doubt(line) else line.state)

    def _is_in_doubt(self, line: RescuedAttempt) -> bool:
        """Return whether a line has neither an answer nor a task to poll. A task of another request counts as none."""
        return line.state in ("in_doubt", "submitting") or self._has_conflicting_task(line)

    def _has_conflicting_task(self, line: RescuedAttempt) -> bool:
        """Return whether the task id of a line belongs to another request that was not in the same bulk task."""
        return self.db.exists(
            "FROM attempts a JOIN requests r ON r.id = a.request_id WHERE a.task_id = ? AND r.fingerprint <> ? "
            # The rows of a bulk task that is not whole have no such task in the ledger, and are never polled.
            "AND NOT (a.claimed_ms = ? AND (a.bulk_task_id IS NOT NULL OR a.gone = 1))",
            line.task_id,
            bytes.fromhex(line.fingerprint),
            line.claimed_ms if line.bulk_task is not None else -1,  # NULL would make the condition NULL
        )


def _mark_submitted(
    db: Database, attempt_id: int, execution_id: int, line: RescuedAttempt, *, already_counted: bool
) -> None:
    """Change an attempt from `submitting` or `in_doubt` to `submitted`. `already_counted`: it was `in_doubt`."""
    db.execute(
        "UPDATE attempts SET state = 'submitted', task_id = ?, submitted_ms = ?, settled_ms = NULL, error = NULL, "
        "acknowledged = ? WHERE id = ?",
        (line.task_id, line.submitted_ms, int(line.acknowledged), attempt_id),
    )
    db.execute(
        "UPDATE requests SET state = 'submitted', attempt_count = attempt_count + ? WHERE attempt_id = ?",
        (0 if already_counted else 1, attempt_id),
    )
    db.execute(
        "UPDATE executions SET submitted = "
        "(SELECT count(submitted_ms) FROM attempts WHERE execution_id = executions.id) WHERE id = ?",
        (execution_id,),
    )
    records.bind(db, {"api_host": line.api_host, "workspace": line.workspace})


def _settle_if_answered(db: Database, attempt_id: int, execution_id: int, line: RescuedAttempt) -> bool:
    """Store the answer of a line, if it has one, for a `submitted` attempt. Return whether it was stored.

    A bulk task is polled again, because its price belongs to all of its requests.
    """
    if line.state not in SETTLED_STATES or line.bulk_task is not None:
        return False
    answer = Answer(State(line.state), line.error, line.provider, line.credits, line.answer)
    transitions.settle(db, [(attempt_id, answer, line.settled_ms or 0)], execution_id, 0)
    return True


def _find_or_create_request(db: Database, line: RescuedAttempt) -> _RequestState:
    """Return the request of a line. Create it if it is missing."""
    fingerprint = bytes.fromhex(line.fingerprint)
    find = (
        "SELECT r.id, r.state, r.attempt_id, coalesce(a.claimed_ms, 0), a.bulk_task_id IS NOT NULL FROM requests r "
        "LEFT JOIN attempts a ON a.id = r.attempt_id WHERE r.fingerprint = ?"
    )
    row = db.execute(find, (fingerprint,)).fetchone()
    if row is None:
        db.execute("INSERT INTO calls (canonical) VALUES (?) ON CONFLICT DO NOTHING", (line.call,))
        db.execute(
            "INSERT INTO requests (fingerprint, call_id, params, state) "
            "SELECT ?, id, ?, 'pending' FROM calls WHERE canonical = ?",
            (fingerprint, line.params, line.call),
        )
        row = db.execute(find, (fingerprint,)).fetchone()
    return _RequestState(*row)


class _RequestState(NamedTuple):
    """A request; the last two are of its newest attempt."""

    id: int
    state: str
    attempt_id: int | None
    claimed_ms: int
    is_bulk: int
