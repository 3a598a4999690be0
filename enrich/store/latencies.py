"""How long the tasks of a call took, kept between executions."""

from __future__ import annotations

from collections.abc import Iterable

from enrich.model import Call
from enrich.store.database import Database


class LatencyQueries(Database):
    """A ledger that remembers when it pays to ask."""

    def load_latencies(self, call: Call, bulk_size: int | None = None) -> list[tuple[float, float]]:
        """Tell how many answers took at most how many seconds, as it was remembered; nothing before the first.

        `bulk`: those of tasks for so many requests.
        """
        return self._db.execute(
            "SELECT seconds, answers FROM latencies WHERE call = ? ORDER BY seconds", (_call_key(call, bulk_size),)
        ).fetchall()

    def save_latencies(self, call: Call, learned: Iterable[tuple[float, float]], bulk_size: int | None = None) -> None:
        """Remember this instead of what was remembered of the call."""
        name = _call_key(call, bulk_size)
        self._db.execute("DELETE FROM latencies WHERE call = ?", (name,))
        self._db.executemany(
            "INSERT INTO latencies VALUES (?, ?, ?)", ((name, seconds, answers) for seconds, answers in learned)
        )


def _call_key(call: Call, bulk_size: int | None) -> str:
    return call.canonical() + ("" if bulk_size is None else f" bulk {bulk_size}")
