"""The row in which processes on several machines keep the rate that they share, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from enrich.ledger.database import Database

T = TypeVar("T")
#: Who has the row and says nothing for so many seconds was stopped or cut off: the others go on.
IDLE_TIMEOUT_S = 1


class SharedRateRow(Database):
    """A connection of its own to the one row of `allowance`; its times are seconds of the server's clock."""

    def update(self, compute: Callable[[str | None, float], tuple[str, T]], *, durable: bool = False) -> T:
        """Let a function change what is written there (None: nothing yet), at a time; return what it tells beside.

        The others wait meanwhile. It may be called again when the server was away. What is not `durable` may be lost
        when the server crashes. Raises DatabaseFailed.
        """
        return self.retry_on_disconnect(lambda: self._update(compute, durable=durable))

    def _update(self, compute: Callable[[str | None, float], tuple[str, T]], *, durable: bool) -> T:
        with self.transaction():
            if not durable:  # nobody waits for the disk
                self._db.execute("SET LOCAL synchronous_commit = off")
            self._db.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_TIMEOUT_S:g}s'")
            self._db.execute("INSERT INTO allowance VALUES (1, '') ON CONFLICT DO NOTHING")
            # The time is told when the row is ours, not when we began to wait for it.
            state, now = self._db.execute(
                "SELECT state, extract(epoch FROM clock_timestamp())::float8 "
                "FROM (SELECT state FROM allowance FOR UPDATE) AS ours"
            ).fetchone()
            state, result = compute(state or None, float(now))
            self._db.execute("UPDATE allowance SET state = ?", (state,))
        return result
