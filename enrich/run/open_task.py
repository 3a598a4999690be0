"""A task that is being polled: what is known of it, and replies that need confirmation."""

from __future__ import annotations

from dataclasses import dataclass, field

from enrich.models import Task

#: A 404 counts after this many in a row, over at least `Timeouts.young_task_s`. So does an unreadable answer.
CONFIRMING_REPLIES = 5
#: An answer about a task that the ledger does not have counts after this many identical ones.
CONFIRMING_FOREIGN_REPLIES = 3


@dataclass(slots=True)
class Repeated:
    """What the last replies have in common, how many came in a row, and since when (monotonic, seconds)."""

    value: object = None
    count: int = 0
    since: float = 0.0

    def add(self, value: object, now: float) -> Repeated:
        """Count a reply. One with another value than the last begins anew."""
        if not self.count or value != self.value:
            self.value, self.count, self.since = value, 0, now
        self.count += 1
        return self

    def is_conclusive(self, now: float, min_duration_s: float) -> bool:
        """Return whether the reply came often enough, over at least `min_duration_s` seconds."""
        return self.count >= CONFIRMING_REPLIES and now - self.since >= min_duration_s


@dataclass(slots=True)
class OpenTask:
    """A task without a result yet. The poll schedule learns only from tasks with `submitted_in_this_run`."""

    task: Task
    submitted_in_this_run: bool
    acknowledged: bool
    #: Time of submission by the monotonic clock, in seconds.
    submitted_at_s: float
    #: The task was counted as lost. Polling it is free, and the API may have deleted it.
    written_off: bool = False
    #: The request is about to be resent, so a 404 needs as many confirmations as for any other task.
    to_be_resubmitted: bool = False
    #: Age in seconds when a poll last found it running.
    last_running_age_s: float = 0.0
    #: Send the next poll over a new connection.
    needs_new_connection: bool = False
    #: The poll that is running began after it was known to be the last one.
    is_last_poll: bool = False
    #: The phases that replies named, polls that failed, replies that need confirmation, and answers about a task that
    #: the ledger lacks.
    phase: Repeated = field(default_factory=Repeated)
    failed_poll: Repeated = field(default_factory=Repeated)
    unconfirmed_reply: Repeated = field(default_factory=Repeated)
    foreign_reply: Repeated = field(default_factory=Repeated)
