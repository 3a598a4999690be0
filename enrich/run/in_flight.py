"""How many tasks may be open at Databar at once. Pure.

By Little's law, the tasks that are open on average are the tasks submitted per second times the seconds that each is
open. Each task takes two requests or more, so a limit of the rate of all requests times the learned age leaves slots
idle only while too little is known.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The limit before anything is known. It never falls below this.
START_LIMIT = 200
MAX_LIMIT = 10_000
#: The limit starts to follow the rate and the age after this many answers.
MIN_ANSWERS = 20
#: Tasks vary in age, and are open until the poll after their end. With room to spare, polls can wait for a better time.
MARGIN = 2.0
#: All open tasks must be fetchable within this share of the time for which the API keeps results.
FETCH_WINDOW_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class InFlightLimit:
    """The limit of a run, or the equal share that one of its `workers` has. `configured` None: it is found."""

    configured: int | None = None
    workers: int = 1

    @property
    def start(self) -> int:
        """The limit of the whole run before anything is known."""
        return START_LIMIT if self.configured is None else self.configured

    def max_open_tasks(self, rate: float, *, answers: int, age_s: float, result_ttl_s: float) -> int:
        """Return how many tasks may be open here, at least one.

        `rate` is in requests per second, submits and polls together, `answers` the number of tasks that `age_s`, their
        mean duration, was learned from; all three are those of this worker.
        """
        limit = self.start / self.workers
        if self.configured is None and answers * self.workers >= MIN_ANSWERS:
            limit = min(max(limit, MARGIN * rate * age_s), MAX_LIMIT / self.workers)
        return max(1, int(min(limit, rate * result_ttl_s * FETCH_WINDOW_SHARE)))
