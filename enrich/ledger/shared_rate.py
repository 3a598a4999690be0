"""The row that stores the request rate shared by processes on several machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from enrich.ledger.database import Database

T = TypeVar("T")
#: A process that holds the row idle for this many seconds was stopped or disconnected. The server then frees the row.
IDLE_TIMEOUT_S = 1


class SharedRateRow(Database):
    """A separate connection to the single row of `allowance`. Times are seconds of the server's clock."""

    def update(self, compute: Callable[[str | None, float], tuple[str, T]], *, durable: bool = False) -> T:
        """Replace the stored state by means of `compute`, and return its result.

        `compute` gets the stored state (None: not set yet) and the time in seconds; it returns the new state and the
        result. It may be called again after a lost connection. Other processes wait meanwhile. An update that is not
        `durable` may be lost when the server crashes. Raises DatabaseFailed.
        """
        return self.retry_on_disconnect(lambda: self._update(compute, durable=durable))

    def _update(self, compute: Callable[[str | None, float], tuple[str, T]], *, durable: bool) -> T:
        with self.transaction():
            if not durable:  # do not wait for the disk
                self._db.execute("SET LOCAL synchronous_commit = off")
            self._db.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_TIMEOUT_S:g}s'")
            self._db.execute("INSERT INTO allowance VALUES (1, '') ON CONFLICT DO NOTHING")
            # Read the clock once the row is locked, not when the wait for it began.
            state, now = self._db.execute(
                "SELECT state, extract(epoch FROM clock_timestamp())::float8 "
                "FROM (SELECT state FROM allowance FOR UPDATE) AS ours"
            ).fetchone()
            state, result = compute(state or None, float(now))
            self._db.execute("UPDATE allowance SET state = ?", (state,))
        return result
