"""What was paid for while the ledger could not be written: kept beside it, and taken in by the next run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from enrich.errors import Refused
from enrich.model import Answer, State, written
from enrich.store.holding import Holding
from enrich.store.intake import OPEN_ATTEMPT
from enrich.store.rescue_file import Paid, read_rescue, rescue_files
from enrich.store.task_ids import NUMBERS

#: Attempts whose answer would be charged again without them.
_OPEN = "a.state IN ('submitting', 'submitted') OR (a.state = 'in_doubt' AND a.id = r.attempt_id)"
_ANSWERED = (
    "a.state IN ('found', 'not_found', 'failed', 'expired') AND a.id IN (r.attempt_id, r.answer_id) "
    "AND r.erased_ms IS NULL AND a.task_id IS NOT NULL"
)
SETTLED = ("found", "not_found", "failed", "expired")
_ORDER = ("found", "not_found", "submitted", "failed", "expired", "in_doubt", "submitting")
_UNKNOWN = "the ledger could not be written, and the answer to the request is not known"
_FIELDS = (
    "a.id AS attempt, r.fingerprint, c.canonical AS call, r.params, e.paths, a.state, a.task_id, a.claimed_ms, "
    "a.submitted_ms, a.settled_ms, a.reserved, a.seen_alive, "
    # The price of a task of many is known for all of it: it stands with its first request.
    "CASE WHEN a.bundle_id IS NULL THEN a.credits WHEN a.place = 0 THEN b.credits ELSE b.credits * 0 END AS credits, "
    "a.provider, a.error, a.answer, a.bundle_id AS bundle, a.place, b.size"
)


@dataclass(frozen=True, slots=True)
class TakenIn:
    """What came of the attempts of a rescue file, by what they are in the ledger now; `known`: it had them already."""

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
            (self.known, "already known"),
        ]
        return ", ".join(f"{count} {what}" for count, what in parts if count) or "nothing new"


class Rescue(Holding):
    """A ledger whose attempts can be written to a rescue file, and taken in from one."""

    def paid(self, attempts: Collection[int]) -> list[Paid]:
        """Return these attempts, as far as they are in the ledger."""
        return list(self._paid(f"a.id IN ({NUMBERS.format('?')})", written(list(attempts))))

    def open_attempts(self) -> list[Paid]:
        """Return what is at the API or in doubt."""
        return list(self._paid(_OPEN))

    def answered_attempts(self) -> Iterator[Paid]:
        """Yield the answers that count."""
        return self._paid(_ANSWERED)

    def _paid(self, which: str, *values: object) -> Iterator[Paid]:
        facts = dict(
            self._db.execute("SELECT name, value FROM facts WHERE name IN ('api_host', 'workspace')").fetchall()
        )
        rows = self._rows(
            f"SELECT {_FIELDS} FROM attempts a JOIN requests r ON r.id = a.request_id JOIN calls c ON c.id = r.call_id "
            f"JOIN executions e ON e.id = a.execution_id LEFT JOIN bundles b ON b.id = a.bundle_id WHERE {which} "
            "ORDER BY a.id",
            *values,
        )
        for row in rows:
            told = dict(row) | facts
            told |= {"fingerprint": row["fingerprint"].hex(), "paths": json.loads(row["paths"])}
            yield Paid(ledger=str(self.place), **told | {"seen_alive": bool(row["seen_alive"])})

    def take_in(self, lines: Sequence[Paid], job: str, now_ms: int) -> TakenIn:
        """Take in the attempts of a rescue file; what the ledger has already stays, so that it may be done again.

        Raises Refused when they belong to another API host or workspace.
        """
        self._check_bound(lines)
        taken: Counter[str] = Counter()
        holders = self._holders(lines)
        rest = [line for line in lines if not self._complete(line, holders, now_ms, taken)]
        # What is still `submitting` was left by a kill: that attempt is in doubt before its request gets another one.
        self.recover(now_ms)
        rest = [line for line in rest if line.state != "refused"]
        best = _best(rest, holders)
        taken["known"] += len(rest) - len(best)
        for paths in dict.fromkeys(tuple(line.paths) for line in best):
            self._insert([line for line in best if tuple(line.paths) == paths], holders, job, now_ms, taken)
        self._db.execute(
            "UPDATE executions SET reserved = (SELECT max(executions.reserved, coalesce(sum(reserved), 0)) "
            f"FROM attempts WHERE {OPEN_ATTEMPT}) WHERE id = (SELECT max(id) FROM executions)"
        )
        return TakenIn(**taken)

    def _check_bound(self, lines: Sequence[Paid]) -> None:
        for name in ("api_host", "workspace"):
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            told = {getattr(line, name) for line in lines} - {None}
            if len(told | ({row[0]} if row else set())) > 1:
                raise Refused(
                    f"the rescue file belongs to another {name.replace('_', ' ')} than this ledger",
                    "move it away, or use the `ledger:` that it was written for",
                )

    def _holders(self, lines: Iterable[Paid]) -> dict[str, list[_Holder]]:
        """Find the attempts of the ledger that have the task ids of these lines."""
        tasks = [line.task_id for line in lines if line.task_id is not None]
        rows = self._db.execute(
            "SELECT a.task_id, r.fingerprint, a.claimed_ms, a.bundle_id IS NOT NULL FROM attempts a "
            "JOIN requests r ON r.id = a.request_id "
            "WHERE a.task_id IN (SELECT value FROM json_each(CAST(? AS TEXT)))",
            (written(tasks),),
        )
        found: dict[str, list[_Holder]] = {}
        for task_id, fingerprint, claimed_ms, bundled in rows:
            found.setdefault(task_id, []).append(_Holder(fingerprint.hex(), claimed_ms, bool(bundled)))
        return found

    def _complete(self, line: Paid, holders: dict[str, list[_Holder]], now_ms: int, taken: Counter[str]) -> bool:
        """Complete the very attempt that a line is about; return False when the ledger does not have it."""
        row = self._db.execute(
            "SELECT a.id, a.state, a.task_id, a.execution_id, r.attempt_id = a.id, a.bundle_id IS NOT NULL "
            "FROM attempts a JOIN requests r ON r.id = a.request_id WHERE r.fingerprint = ? AND a.claimed_ms = ? "
            "ORDER BY a.id DESC LIMIT 1",
            (bytes.fromhex(line.fingerprint), line.claimed_ms),
        ).fetchone()
        if row is None or (None not in (row[2], line.task_id) and row[2] != line.task_id):
            return False
        number, state, _, execution_id, newest, bundled = row
        fetchable = newest and bool(bundled) == (line.bundle is not None) and not _doubtful(line, holders)
        if state in ("submitting", "in_doubt") and fetchable and line.task_id is not None:
            self._submit(number, execution_id, line, counted=state == "in_doubt")
            holders.setdefault(line.task_id, []).append(_Holder.of(line))
            taken["answered" if self._settle_late(number, execution_id, line) else "submitted"] += 1
        elif state == "submitted" and newest and self._settle_late(number, execution_id, line):
            taken["answered"] += 1
        elif state == "submitting" and line.state == "refused":
            self.refused([(number, line.error or "not accepted", now_ms)])
            taken["refused"] += 1
        elif state == "submitting" and line.state == "failed" and line.task_id is None:
            self.rejected([(number, line.error or "not accepted", now_ms)])
            taken["refused"] += 1
        elif state == "submitting":
            self.doubt([(number, line.error or _UNKNOWN, now_ms, line.task_id)])
            taken["in_doubt"] += 1
        else:
            taken["known"] += 1
        return True

    def _submit(self, number: int, execution_id: int, line: Paid, *, counted: bool) -> None:
        """Make an attempt `submitted` that was `submitting`, or in doubt (and counted then)."""
        self._db.execute(
            "UPDATE attempts SET state = 'submitted', task_id = ?, submitted_ms = ?, settled_ms = NULL, error = NULL, "
            "seen_alive = ? WHERE id = ?",
            (line.task_id, line.submitted_ms, int(line.seen_alive), number),
        )
        self._db.execute(
            "UPDATE requests SET state = 'submitted', attempts = attempts + ? WHERE attempt_id = ?",
            (0 if counted else 1, number),
        )
        self._db.execute(
            "UPDATE executions SET submitted = "
            "(SELECT count(submitted_ms) FROM attempts WHERE execution_id = executions.id) WHERE id = ?",
            (execution_id,),
        )
        self.bind({"api_host": line.api_host, "workspace": line.workspace})

    def _settle_late(self, number: int, execution_id: int, line: Paid) -> bool:
        """Write down the answer of a line, if it has one, for an attempt that is `submitted`.

        A task of many is asked for again: its price belongs to all of its requests.
        """
        if line.state not in SETTLED or line.bundle is not None:
            return False
        answer = Answer(State(line.state), line.error, line.provider, line.credits, line.answer)
        self.settle([(number, answer, line.settled_ms or 0)], execution_id, 0)
        return True

    def _insert(
        self, lines: Sequence[Paid], holders: dict[str, list[_Holder]], job: str, now_ms: int, taken: Counter[str]
    ) -> None:
        """Make attempts for lines of one job of which the ledger has none, in an execution of their own."""
        found = [(line, self._request(line)) for line in lines]
        wanted = [(line, request) for line, request in found if self._is_wanted(line, request, holders)]
        taken["known"] += len(found) - len(wanted)
        if not wanted:
            return
        execution_id = self._execution(wanted[0][0], job, min(line.claimed_ms for line, _ in wanted), now_ms)
        together = Counter(line.bundle for line, _ in wanted if line.state == "submitted")
        bundles: dict[int, int] = {}
        for line, request in wanted:
            state = "in_doubt" if line.state == "submitting" else line.state
            # The answers of a task of many go by their places: without all of them none can be assigned.
            torn = line.bundle is not None and together[line.bundle] != line.size
            if state == "submitted" and (torn or _taken(line, holders)):
                state = "in_doubt"
            bundle = None
            if line.bundle is not None and state == "submitted":
                if line.bundle not in bundles:
                    bundles[line.bundle] = self._bundle(execution_id, line)
                bundle = bundles[line.bundle]
            self._attempt(execution_id, request, line, state, bundle)
            if line.task_id is not None:
                holders.setdefault(line.task_id, []).append(_Holder.of(line))
            taken[state if state in ("submitted", "in_doubt") else "answered"] += 1

    def _request(self, line: Paid) -> _Request:
        """Find a line's request; it is made when it is not there."""
        fingerprint = bytes.fromhex(line.fingerprint)
        find = "SELECT id, state, attempt_id FROM requests WHERE fingerprint = ?"
        row = self._db.execute(find, (fingerprint,)).fetchone()
        if row is None:
            self._db.execute("INSERT INTO calls (canonical) VALUES (?) ON CONFLICT DO NOTHING", (line.call,))
            self._db.execute(
                "INSERT INTO requests (fingerprint, call_id, params, state) "
                "SELECT ?, id, ?, 'pending' FROM calls WHERE canonical = ?",
                (fingerprint, line.params, line.call),
            )
            row = self._db.execute(find, (fingerprint,)).fetchone()
        return _Request(*row)

    def _is_wanted(self, line: Paid, request: _Request, holders: Mapping[str, list[_Holder]]) -> bool:
        """Tell whether a line knows more about its request than the ledger does."""
        if _doubtful(line, holders):
            return request.state == "pending"
        (known,) = self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM attempts WHERE request_id = ? "
            "AND task_id IS NOT DISTINCT FROM CAST(? AS TEXT) AND CAST(? AS TEXT) IS NOT NULL)",
            (request.id, line.task_id, line.task_id),
        ).fetchone()
        return request.state in ("pending", "in_doubt") and not known

    def _execution(self, line: Paid, job: str, started_ms: int, now_ms: int) -> int:
        """Record the run that made these attempts; it has ended without a receipt, unlike any run of this ledger."""
        row = self._db.execute(
            "INSERT INTO executions (job, started_ms, ended_ms, exit_code, paths, reserved) VALUES (?, ?, ?, 1, ?, "
            f"(SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT})) RETURNING id",
            (job, started_ms, now_ms, json.dumps(line.paths)),
        ).fetchone()
        return int(row[0])

    def _bundle(self, execution_id: int, line: Paid) -> int:
        insert = "INSERT INTO bundles (execution_id, size) VALUES (?, ?) RETURNING id"
        row = self._db.execute(insert, (execution_id, line.size)).fetchone()
        return int(row[0])

    def _attempt(self, execution_id: int, request: _Request, line: Paid, state: str, bundle: int | None) -> None:
        settled = state in SETTLED
        row = self._db.execute(
            "INSERT INTO attempts (request_id, execution_id, came_from, previous_id, state, task_id, claimed_ms, "
            "submitted_ms, settled_ms, settled_in, seen_alive, reserved, credits, provider, error, answer, "
            "bundle_id, place) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            (
                request.id,
                execution_id,
                request.state,
                request.attempt_id,
                state,
                line.task_id,
                line.claimed_ms,
                line.submitted_ms,
                None if state == "submitted" else line.settled_ms or line.claimed_ms,
                execution_id if settled else None,
                int(line.seen_alive),
                line.reserved,
                line.credits if settled else None,
                line.provider,
                line.error or (_UNKNOWN if state == "in_doubt" else None),
                line.answer if settled else None,
                bundle,
                None if bundle is None else line.place,
            ),
        ).fetchone()
        self._db.execute(
            "UPDATE requests SET state = ?1, attempt_id = ?2, attempts = attempts + 1, position = NULL, "
            "answer_id = CASE WHEN ?1 = 'found' THEN ?2 ELSE answer_id END WHERE id = ?3",
            (state, row[0], request.id),
        )
        known = settled and line.credits is not None
        self._db.execute(
            "UPDATE executions SET reserved = reserved + ?, spent = spent + ?, unknown = unknown + ?, "
            "submitted = submitted + ? WHERE id = ?",
            (
                0 if known else line.reserved,
                (line.credits or 0) if settled else 0,
                int(settled and line.credits is None),
                int(line.submitted_ms is not None),
                execution_id,
            ),
        )
        if line.task_id is not None:
            self.bind({"api_host": line.api_host, "workspace": line.workspace})


class _Request(NamedTuple):
    id: int
    state: str
    attempt_id: int | None


class _Holder(NamedTuple):
    """An attempt that has a task."""

    fingerprint: str
    claimed_ms: int
    bundled: bool

    @classmethod
    def of(cls, line: Paid) -> _Holder:
        return cls(line.fingerprint, line.claimed_ms, line.bundle is not None)


def _best(lines: Iterable[Paid], holders: Mapping[str, list[_Holder]]) -> list[Paid]:
    """Choose one of several lines about a request: an answer before a task, a task before a doubt."""
    chosen: dict[str, tuple[int, Paid]] = {}
    for line in lines:
        rank = _ORDER.index("in_doubt" if _doubtful(line, holders) else line.state)
        if line.fingerprint not in chosen or rank < chosen[line.fingerprint][0]:
            chosen[line.fingerprint] = rank, line
    return [line for _, line in chosen.values()]


def _doubtful(line: Paid, holders: Mapping[str, list[_Holder]]) -> bool:
    """Tell whether a line brings neither an answer nor a task that can be asked for."""
    return line.state in ("in_doubt", "submitting") or (line.state == "submitted" and _taken(line, holders))


def _taken(line: Paid, holders: Mapping[str, list[_Holder]]) -> bool:
    """Tell whether the task of a line is that of another request, which was not sent together with it."""
    return any(
        other.fingerprint != line.fingerprint
        and not (other.bundled and line.bundle is not None and other.claimed_ms == line.claimed_ms)
        for other in holders.get(line.task_id or "", ())
    )


def take_in_files(ledger: Rescue, others: Sequence[Path], job: str, now_ms: int) -> list[tuple[Path, TakenIn]]:
    """Take in the rescue files of a ledger, in the caller's transaction; the caller removes them after its commit.

    `others` are the folders in which one may lie beside that of the ledger. Raises Refused for one that is damaged.
    """
    place = ledger.place
    if not isinstance(place, Path):
        return []
    taken = []
    for path in rescue_files(place, others):
        lines = read_rescue(path)
        # Beside an output there may be that of another ledger of the same name.
        if path.parent != place.parent and any(line.ledger != str(place) for line in lines):
            continue
        try:
            taken.append((path, ledger.take_in(lines, job, now_ms)))
        except Refused as error:
            raise Refused(f"{path}: {error.message}", error.hint) from error
    return taken


def remove_taken(taken: Iterable[tuple[Path, TakenIn]]) -> list[tuple[Path, TakenIn]]:
    """Remove the files that were taken in, and return them. Raises Refused for one that can't be removed."""
    removed = []
    for path, what in taken:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Refused(
                f"{path}: the rescue file cannot be removed: {error.strerror}", "remove it yourself"
            ) from error
        removed.append((path, what))
    return removed
