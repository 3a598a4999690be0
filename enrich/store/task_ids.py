"""Compares task ids: each belongs to one question, whose answer costs once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from enrich.model import Acceptance, Answer, written
from enrich.store.review import Review

#: The numbers of a JSON list.
NUMBERS = "SELECT CAST(value AS BIGINT) FROM json_each(CAST({} AS TEXT))"


class TaskIds(Review):
    """A ledger that compares task ids."""

    def has_task(self, task_id: str) -> bool:
        """Tell whether any attempt has this task id."""
        row = self._db.execute("SELECT EXISTS (SELECT 1 FROM attempts WHERE task_id = ?)", (task_id,)).fetchone()
        return bool(row[0])

    def _compare_ids(self, task_ids: Mapping[int, str]) -> dict[int, Acceptance]:
        """Compare the task ids that attempts were given with each other and with those in the ledger."""
        means = dict.fromkeys(task_ids, Acceptance.NEW)
        ids = written([[task_id] for task_id in task_ids.values()])
        if self._db.dialect.lock_task_ids:
            self._db.execute(self._db.dialect.lock_task_ids, (ids,)).fetchall()
        held = self._db.execute(
            "SELECT DISTINCT task_id FROM attempts WHERE task_id IN (SELECT value->>0 FROM json_each(CAST(? AS TEXT)))",
            (ids,),
        )
        shared = {task_id for (task_id,) in held} | {
            name for name, count in Counter(task_ids.values()).items() if count > 1
        }
        for task_id in sorted(shared):
            given = [attempt for attempt, its_id in task_ids.items() if its_id == task_id]
            rows = self._db.execute(
                # The attempts of a bundle are one POST, and share its id. Those that have the id come first.
                "SELECT coalesce(-a.bundle_id, a.id), a.id, a.place, r.call_id, r.params FROM attempts a "
                f"JOIN requests r ON r.id = a.request_id WHERE a.task_id = ?1 OR a.id IN ({NUMBERS.format('?2')}) "
                "ORDER BY a.task_id IS NULL, a.id",
                (task_id, written(given)),
            ).fetchall()
            questions: dict[int, list[object]] = {}
            for post, _, *question in rows:
                questions.setdefault(post, []).append(question)
            first, asked = next(iter(questions.items()))
            for post, attempt, *_ in rows:
                if attempt in means and post != first:
                    means[attempt] = Acceptance.CACHED if questions[post] == asked else Acceptance.TAKEN
        return means

    def _priced_once(self, told: Sequence[tuple[int, Answer, int]]) -> list[tuple[int, Answer, int]]:
        """Let a task that two attempts have (the API's cache) cost once."""
        priced = [attempt_id for attempt_id, answer, _ in told if answer.credits]
        if not priced:
            return list(told)
        rows = self._db.execute(
            "SELECT a.id, a.task_id, max(CASE WHEN o.credits > 0 THEN 1 ELSE 0 END) FROM attempts a "
            "JOIN attempts o ON o.task_id = a.task_id AND o.id <> a.id "
            f"WHERE a.id IN ({NUMBERS.format('?')}) GROUP BY 1, 2",
            (written(priced),),
        ).fetchall()
        shared = {attempt_id: task_id for attempt_id, task_id, _ in rows}
        paid = {task_id for _, task_id, is_paid in rows if is_paid}
        once = []
        for attempt_id, answer, now_ms in told:
            task_id = shared.get(attempt_id)
            once.append((attempt_id, replace(answer, credits=0) if task_id in paid else answer, now_ms))
            if task_id is not None:
                paid.add(task_id)
        return once

    def _is_paid(self, attempt_id: int) -> bool:
        """Tell whether another bundle has the task of this one, and its price."""
        row = self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM attempts a JOIN attempts o ON o.task_id = a.task_id "
            "JOIN bundles b ON b.id = o.bundle_id WHERE a.id = ? AND b.id <> a.bundle_id AND b.credits > 0)",
            (attempt_id,),
        ).fetchone()
        return bool(row[0])
