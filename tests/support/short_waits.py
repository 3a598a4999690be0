"""Shorter waits in runs than a real API needs: the sandbox answers at once, and hundreds of tests run against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import inf
from unittest.mock import patch

from enrich.commands import run as run_command
from enrich.run import poller, rate_limit
from enrich.run.context import RunEnvironment
from enrich.run.poll_schedule import PollSchedule
from enrich.run.run_state import Timeouts

#: The timeouts of runs whose tests name none.
TIMEOUTS = Timeouts(ready_results_s=0.3, no_data_s=0.3)
WAITS = (
    (PollSchedule, "FIRST_GUESS_S", 0.05),
    (PollSchedule, "MIN_DELAY_S", 0.05),
    (poller, "NO_DATA_POLL_S", 0.1),
    (poller, "YOUNG_TASK_POLL_S", 0.3),
    (poller, "FAILED_POLL_S", 0.2),
    # A run begins with the rate that the job allows, instead of finding it.
    (rate_limit, "START_RATE_WITH_CEILING", inf),
    (rate_limit, "MAX_PAUSE_S", 0.4),
)


@contextmanager
def short_waits() -> Iterator[None]:
    """Let the runs of this process wait only briefly."""
    with ExitStack() as stack:
        for owner, name, value in WAITS:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(patch.object(run_command, "RunEnvironment", partial(RunEnvironment, timeouts=TIMEOUTS)))
        yield
