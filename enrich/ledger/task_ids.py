"""Compares task ids: each belongs to one request, whose answer is charged once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from enrich.ledger.queries import HistoryQueries
from enrich.models import Acceptance, Answer, to_json_text

#: The numbers of a JSON list.
JSON_NUMBERS = "SELECT CAST(value AS BIGINT) FROM json_each(CAST({} AS TEXT))"


class TaskIdQueries(HistoryQueries):
    """A ledger with comparisons of task ids."""

    def has_task(self, task_id: str) -> bool:
        """Return whether any attempt has this task id."""
        row = self._db.execute("SELECT EXISTS (SELECT 1 FROM attempts WHERE task_id = ?)", (task_id,)).fetchone()
        return bool(row[0])

    def _check_task_ids(self, task_ids: Mapping[int, str]) -> dict[int, Acceptance]:
        """Compare the task ids of attempts with each other and with those in the ledger. Return what each means."""
        acceptances = dict.fromkeys(task_ids, Acceptance.NEW)
        ids = to_json_text([[task_id] for task_id in task_ids.values()])
        if self._db.dialect.lock_task_ids:
            self._db.execute(self._db.dialect.lock_task_ids, (ids,)).fetchall()
        known_ids = self._db.execute(
            "SELECT DISTINCT task_id FROM attempts WHERE task_id IN (SELECT value->>0 FROM json_each(CAST(? AS TEXT)))",
            (ids,),
        )
        shared_ids = {task_id for (task_id,) in known_ids} | {
            name for name, count in Counter(task_ids.values()).items() if count > 1
        }
        for task_id in sorted(shared_ids):
            attempt_ids = [attempt for attempt, its_id in task_ids.items() if its_id == task_id]
            rows = self._db.execute(
                # The attempts of a bulk task are one POST and share its id. Attempts that have the id come first.
                "SELECT coalesce(-a.bundle_id, a.id), a.id, a.place, r.call_id, r.params FROM attempts a "
                f"JOIN requests r ON r.id = a.request_id WHERE a.task_id = ?1 OR a.id IN ({JSON_NUMBERS.format('?2')}) "
                "ORDER BY a.task_id IS NULL, a.id",
                (task_id, to_json_text(attempt_ids)),
            ).fetchall()
            requests_by_post: dict[int, list[object]] = {}
            for post, _, *request in rows:
                requests_by_post.setdefault(post, []).append(request)
            first_post, first_request = next(iter(requests_by_post.items()))
            for post, attempt, *_ in rows:
                if attempt in acceptances and post != first_post:
                    acceptances[attempt] = (
                        Acceptance.CACHED if requests_by_post[post] == first_request else Acceptance.CONFLICT
                    )
        return acceptances

    def _charge_once(self, answers: Sequence[tuple[int, Answer, int]]) -> list[tuple[int, Answer, int]]:
        """Charge a task that two attempts share (the API's cache) only once."""
        charged_ids = [attempt_id for attempt_id, answer, _ in answers if answer.credits]
        if not charged_ids:
            return list(answers)
        rows = self._db.execute(
            "SELECT a.id, a.task_id, max(CASE WHEN o.credits > 0 THEN 1 ELSE 0 END) FROM attempts a "
            "JOIN attempts o ON o.task_id = a.task_id AND o.id <> a.id "
            f"WHERE a.id IN ({JSON_NUMBERS.format('?')}) GROUP BY 1, 2",
            (to_json_text(charged_ids),),
        ).fetchall()
        shared_ids = {attempt_id: task_id for attempt_id, task_id, _ in rows}
        paid_ids = {task_id for _, task_id, is_paid in rows if is_paid}
        charged_once = []
        for attempt_id, answer, now_ms in answers:
            task_id = shared_ids.get(attempt_id)
            charged_once.append((attempt_id, replace(answer, credits=0) if task_id in paid_ids else answer, now_ms))
            if task_id is not None:
                paid_ids.add(task_id)
        return charged_once

    def _is_task_paid(self, attempt_id: int) -> bool:
        """Return whether another bulk task has the same task id and a price."""
        row = self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM attempts a JOIN attempts o ON o.task_id = a.task_id "
            "JOIN bundles b ON b.id = o.bundle_id WHERE a.id = ? AND b.id <> a.bundle_id AND b.credits > 0)",
            (attempt_id,),
        ).fetchone()
        return bool(row[0])
