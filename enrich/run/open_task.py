"""A task that is being polled: what is known of it, and replies that need confirmation."""

from __future__ import annotations

from dataclasses import dataclass

from enrich.databar.task_results import TaskPhase
from enrich.models import Task

#: A 404 counts after this many in a row, over at least `Timeouts.young_task_s`. So does an unreadable answer.
CONFIRMING_REPLIES = 5
#: An answer about a task that the ledger does not have counts after this many identical ones.
CONFIRMING_FOREIGN_REPLIES = 3


@dataclass(slots=True)
class RepeatedReply:
    """A reply that needs confirmation: what it is, how often it came in a row, and since when (monotonic, seconds)."""

    description: str
    since: float
    count: int = 0

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
    #: Age in seconds when a poll last found it running.
    last_running_age_s: float = 0.0
    #: The phase that the last reply named, and since when (monotonic, seconds).
    phase: TaskPhase | None = None
    phase_since: float = 0.0
    #: Send the next poll over a new connection.
    needs_new_connection: bool = False
    #: The poll that is running began after it was known to be the last one.
    is_last_poll: bool = False
    repeated_reply: RepeatedReply | None = None
    #: The last answer about a task that the ledger does not have, and how often it came in a row.
    last_foreign_reply: str = ""
    foreign_reply_count: int = 0
    #: The request is about to be resent, so a 404 needs as many confirmations as for any other task.
    to_be_resubmitted: bool = False

    def phase_age_s(self, phase: TaskPhase, now: float) -> float:
        """Record the phase that a reply names. Return for how many seconds all replies have named it."""
        if phase is not self.phase:
            self.phase, self.phase_since = phase, now
        return now - self.phase_since

    def count_repeat(self, description: str, now: float) -> RepeatedReply:
        """Count a reply that needs confirmation."""
        if self.repeated_reply is None or self.repeated_reply.description != description:
            self.repeated_reply = RepeatedReply(description, now)
        self.repeated_reply.count += 1
        return self.repeated_reply
