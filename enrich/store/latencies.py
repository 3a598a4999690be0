"""How long the tasks of a call took, kept between executions."""

from __future__ import annotations

from collections.abc import Iterable

from enrich.model import Call
from enrich.store.database import Database


class Latencies(Database):
    """A ledger that remembers when it pays to ask."""

    def latencies(self, call: Call) -> list[tuple[float, float]]:
        """Tell how many answers took at most how many seconds, as it was remembered; nothing before the first."""
        return self._db.execute(
            "SELECT seconds, answers FROM latencies WHERE call = ? ORDER BY seconds", (call.canonical(),)
        ).fetchall()

    def remember_latencies(self, call: Call, learned: Iterable[tuple[float, float]]) -> None:
        """Remember this instead of what was remembered of the call."""
        self._db.execute("DELETE FROM latencies WHERE call = ?", (call.canonical(),))
        self._db.executemany(
            "INSERT INTO latencies VALUES (?, ?, ?)",
            ((call.canonical(), seconds, answers) for seconds, answers in learned),
        )
