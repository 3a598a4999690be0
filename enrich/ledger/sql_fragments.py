"""Parts of SQL statements that several modules share."""

from __future__ import annotations

#: Exactly the condition of the index `open_attempts`. With other wording SQLite would read all attempts.
OPEN_ATTEMPT = "state IN ('submitting', 'submitted')"
#: Exactly the condition of the index `queue`: requests that this run may send, including those sent before.
QUEUED = "queue_position IS NOT NULL AND state NOT IN ('submitting', 'submitted')"
#: The numbers of a JSON list.
JSON_NUMBERS = "SELECT CAST(value AS BIGINT) FROM json_each(CAST({} AS TEXT))"
#: Attempt ids follow the order of runs, so the attempts of run ?1 and later are found without reading all of them.
SINCE_EXECUTION = "id > coalesce((SELECT id FROM attempts WHERE execution_id < ?1 ORDER BY id DESC LIMIT 1), 0)"
#: A LIMIT without effect. It fits into SQLite's 64-bit integers.
MAX_ROWS = 2**62
