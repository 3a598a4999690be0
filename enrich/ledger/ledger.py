"""The ledger stores requests, tasks, results, credits and runs: all SQL and every state transition, no policy.

A method is one operation inside the caller's transaction (`with ledger.transaction(): …`). `LedgerWriter` runs many
of them in one commit. Durable means `synchronous=FULL` in WAL mode: committed data survives a power cut (SQLite docs:
"Pragma synchronous").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from enrich.ledger.enroll import MAX_ROWS, OPEN_ATTEMPT
from enrich.ledger.forgotten import ForgottenRequests, key_id, keyed_hash, read_key
from enrich.ledger.rescue import RescueQueries
from enrich.models import to_json_text


class Ledger(RescueQueries):
    """Requests, their waterfall calls, prices and results. The caller holds the ledger's lock."""

    # What the ledger is bound to

    def read_fact(self, name: str) -> str | None:
        """Return what the ledger is bound to (`api_host`, `workspace`). None: not bound yet."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def rename_workspace(self, name: str) -> None:
        """Rename the workspace that the ledger is bound to."""
        self._db.execute("UPDATE facts SET value = ? WHERE name = 'workspace'", (name,))

    def waterfall(self, identifier: str) -> tuple[dict[str, Any], list[int] | None] | None:
        """Return the waterfall's latest description, and its default providers as first resolved."""
        row = self._db.execute(
            "SELECT description, providers FROM waterfalls WHERE identifier = ?", (identifier,)
        ).fetchone()
        return None if row is None else (json.loads(row[0]), None if row[1] is None else json.loads(row[1]))

    def save_waterfall(self, identifier: str, description: Mapping[str, Any], providers: Sequence[int]) -> None:
        """Store the description and replace the providers. Pass the stored providers to keep them."""
        self._db.execute(
            "INSERT INTO waterfalls VALUES (?, ?, ?) ON CONFLICT (identifier) DO UPDATE "
            "SET description = excluded.description, providers = excluded.providers",
            (identifier, json.dumps(description, ensure_ascii=False), json.dumps(list(providers))),
        )

    # Runs

    def start_execution(
        self, job: str, cap: int | None, now_ms: int, balance: int | None = None, paths: Sequence[str] = ()
    ) -> int:
        """Start a run and return its id. Tasks still open from earlier runs are settled in it and count against `cap`.

        `paths` are the job's columns. A later run that collects answers of this one uses them to decide what is a
        match.
        """
        row = self._db.execute(
            "INSERT INTO executions (job, started_ms, cap, balance_before, paths, reserved) VALUES (?, ?, ?, ?, ?, "
            f"(SELECT coalesce(sum(reserved), 0) FROM attempts WHERE {OPEN_ATTEMPT})) RETURNING id",
            (job, now_ms, cap, balance, json.dumps(list(paths))),
        ).fetchone()
        return int(row[0])

    def save_progress(self, execution_id: int, progress: str) -> None:
        """Store the progress of a run (JSON), unless it has ended."""
        self._db.execute("UPDATE executions SET pulse = ? WHERE id = ? AND ended_ms IS NULL", (progress, execution_id))

    def end_execution(
        self,
        execution_id: int,
        exit_code: int,
        summary: Mapping[str, Any],
        now_ms: int,
        balance: int | None = None,
    ) -> None:
        """Store how a run ended."""
        self._db.execute(
            "UPDATE executions SET ended_ms = ?, exit_code = ?, receipt = ?, balance_after = ? WHERE id = ?",
            (now_ms, exit_code, json.dumps(summary), balance, execution_id),
        )

    def execution(self, execution_id: int) -> Mapping[str, Any]:
        """Return one run, with `spent`, `reserved`, `unknown` and `submitted`."""
        return next(self._rows("SELECT * FROM executions WHERE id = ?", execution_id))

    def has_submitted(self, job: str | None = None) -> bool:
        """Return whether anything was ever submitted from this ledger, for one job if given."""
        sql = "SELECT EXISTS (SELECT 1 FROM executions WHERE submitted > 0 AND (CAST(?1 AS TEXT) IS NULL OR job = ?1))"
        row = self._db.execute(sql, (job,)).fetchone()
        return bool(row[0])

    def has_own_submissions(self) -> bool:
        """Return whether a run of this ledger had a POST accepted. Attempts from a rescue file do not count."""
        row = self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM executions WHERE submitted > 0 AND (receipt IS NOT NULL OR ended_ms IS NULL))"
        ).fetchone()
        return bool(row[0])

    def unknown_task_ids(self, task_ids: Sequence[str]) -> list[str]:
        """Return the task ids that no attempt has."""
        rows = self._db.execute(
            "SELECT value->>0 FROM json_each(CAST(? AS TEXT)) "
            "WHERE value->>0 NOT IN (SELECT task_id FROM attempts WHERE task_id IS NOT NULL)",
            (to_json_text([(task,) for task in task_ids]),),
        )
        return [task for (task,) in rows]

    def executions(self, job: str | None = None, last: int = MAX_ROWS) -> list[Mapping[str, Any]]:
        """Return the newest `last` runs, of one job if given, newest first."""
        sql = "SELECT * FROM executions WHERE CAST(?1 AS TEXT) IS NULL OR job = ?1 ORDER BY id DESC LIMIT ?2"
        return list(self._rows(sql, job, last))

    # The change feed

    def undelivered_rows(self, job: str, feed_rows: Iterable[tuple[int, bytes, int]]) -> list[tuple[int, str | None]]:
        """Return the rows whose attempt is not in a job's feed yet: index, and the answer delivered before, if any.

        `feed_rows` are (index, row key, attempt).
        """
        self._db.execute(
            "CREATE TEMP TABLE IF NOT EXISTS told "
            f"(i BIGINT PRIMARY KEY, row_key {self._db.dialect.blob_type}, attempt_id BIGINT)"
        )
        self._db.clear_table("told")
        self._db.executemany("INSERT INTO told VALUES (?, ?, ?)", feed_rows)
        return self._db.execute(
            "SELECT t.i, a.answer FROM told t LEFT JOIN delivered d ON d.job = ? AND d.row_key = t.row_key "
            "LEFT JOIN attempts a ON a.id = d.attempt_id WHERE d.attempt_id IS DISTINCT FROM t.attempt_id ORDER BY t.i",
            (job,),
        ).fetchall()

    def mark_delivered(self, job: str, feed_rows: Iterable[tuple[int, bytes, int]]) -> None:
        """Record what a job's feed has delivered."""
        self._db.executemany(
            "INSERT INTO delivered VALUES (?, ?, ?) ON CONFLICT (job, row_key) DO UPDATE "
            "SET attempt_id = excluded.attempt_id",
            ((job, key, attempt) for _, key, attempt in feed_rows),
        )

    # Forget and purge

    def load_forgotten(self) -> ForgottenRequests:
        """Return the hashes of forgotten requests. Raises CommandRefused when their key is missing or another one."""
        hashes = frozenset(row[0] for row in self._db.execute("SELECT hash FROM forgotten"))
        return (
            ForgottenRequests(read_key(self.location, self.read_fact("forgotten_key")), hashes)
            if hashes
            else ForgottenRequests(b"")
        )

    def forget(self, key: bytes, requests: Iterable[tuple[int, bytes, str]], now_ms: int) -> None:
        """Erase requests (id, fingerprint, params) and all their answers.

        Hashes under the key, states and credits stay.
        """
        self.begin_pass()  # In PostgreSQL the rows of the last pass are still there, with group names
        self.bind({"forgotten_key": key_id(key)})
        for request_id, fingerprint, params in requests:
            hashed = keyed_hash(key, fingerprint)
            self._db.execute(
                "INSERT INTO forgotten VALUES (?) ON CONFLICT DO NOTHING", (keyed_hash(key, params.encode()),)
            )
            self._db.execute(
                "UPDATE requests SET fingerprint = ?, params = '{}', erased_ms = ?, forgotten = 1, position = NULL "
                f"WHERE id = ? AND NOT {OPEN_ATTEMPT}",
                (hashed, now_ms, request_id),
            )
            self._db.execute(
                "DELETE FROM delivered WHERE attempt_id IN (SELECT id FROM attempts WHERE request_id = ?)",
                (request_id,),
            )
            # The API's message about a whole task may concern anyone in it.
            self._db.execute(
                "UPDATE attempts SET answer = NULL, error = 'failed; what the API said was erased with a person of the "
                "same task' WHERE state = 'failed' AND task_id IS NOT NULL "
                "AND bundle_id IN (SELECT bundle_id FROM attempts WHERE request_id = ?)",
                (request_id,),
            )
            self._db.execute(
                "UPDATE attempts SET answer = NULL WHERE state = 'expired' "
                "AND bundle_id IN (SELECT bundle_id FROM attempts WHERE request_id = ?)",
                (request_id,),
            )
            self._db.execute(
                "UPDATE attempts SET answer = NULL, error = NULL, task_id = NULL, erased_ms = ? WHERE request_id = ?",
                (now_ms, request_id),
            )

    def purge(self, before_ms: int, now_ms: int) -> int:
        """Erase params, answers and errors of requests settled before `before_ms`; return how many.

        States and credits stay.
        """
        self.begin_pass()
        purged = self._db.execute(
            "UPDATE requests SET params = '{}', erased_ms = ? WHERE erased_ms IS NULL AND position IS NULL "
            "AND state IN ('found', 'not_found', 'failed', 'expired') AND NOT EXISTS (SELECT 1 FROM attempts a "
            "WHERE a.request_id = requests.id AND (a.settled_ms IS NULL OR a.settled_ms >= ?))",
            (now_ms, before_ms),
        ).rowcount
        self._db.execute(
            "UPDATE attempts SET answer = NULL, error = NULL, erased_ms = ?1 WHERE erased_ms IS NULL "
            "AND request_id IN (SELECT id FROM requests WHERE erased_ms = ?1)",
            (now_ms,),
        )
        # The answer of a whole task is stored with its first request, which may have been sent again since.
        self._db.execute(
            "UPDATE attempts SET answer = NULL WHERE state IN ('failed', 'expired') AND answer IS NOT NULL "
            "AND bundle_id IN (SELECT id FROM bundles WHERE settled_ms < ?)",
            (before_ms,),
        )
        return purged

    def requests_with_answers(self) -> Iterator[Mapping[str, Any]]:
        """Yield all requests that were not forgotten: id, fingerprint, state, params and `answers` (a JSON list)."""
        answers = self._db.dialect.json_list.format("a.answer")
        return self._stream_rows(
            f"SELECT r.id, r.fingerprint, r.state, r.params, (SELECT {answers} FROM attempts a "
            "WHERE a.request_id = r.id AND a.answer IS NOT NULL) AS answers FROM requests r WHERE r.forgotten = 0"
        )
