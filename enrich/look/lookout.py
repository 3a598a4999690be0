"""Looks at the newest run of a job without disturbing it: a short read, no lock."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from enrich.job import Job
from enrich.look.picture import Picture, Sign, sign_of
from enrich.model import SystemClock
from enrich.pulse import read_pulse
from enrich.store.database import exists
from enrich.store.history import History, Latest
from enrich.store.lock import is_held

#: A run writes its pulse every 2 s; on a busy disk it may take a while.
PATIENCE_S = 15.0


@dataclass(slots=True)
class Lookout:
    """Looks at a job now and then. A run that gave no sign of life for longer than `patience_s` is not at work.

    Two clocks may differ, and one may be set: a pulse that changed between two looks is fresh whatever its time.
    """

    job: Job
    patience_s: float = PATIENCE_S
    clock: Callable[[], float] = time.monotonic
    _last: tuple[int, str | None] | None = None
    _changed_at: float = 0.0
    _has_changed: bool = False

    def look(self) -> Picture:
        """Look once. Raises Refused when the ledger is none, or can't be read."""
        job, now_ms = self.job, SystemClock().now_ms()
        ttl_ms = int(job.model.policy.result_ttl.total_seconds() * 1000)
        if not exists(job.ledger):
            return Picture(job.name, job.ledger, ttl_ms, now_ms, Sign.NO_LEDGER)
        # Closed again at once: who has a ledger open keeps its run from tidying up at the end.
        with closing(History(job.ledger)) as history:
            run = history.latest(job.name)
        if run is None:
            return Picture(job.name, job.ledger, ttl_ms, now_ms, Sign.NEVER)
        pulse = read_pulse(run.pulse)
        quiet_s = self._quiet_s(run, now_ms - (run.started_ms if pulse is None else pulse.at_ms))
        held = run.id == run.newest and is_held(job.ledger)
        sign = sign_of(run, pulse, quiet_s, self.patience_s, held=held)
        return Picture(job.name, job.ledger, ttl_ms, now_ms, sign, run, pulse)

    def _quiet_s(self, run: Latest, age_ms: int) -> float:
        """Tell how long the run has given no sign, by what the clock says and by what was seen."""
        now, this = self.clock(), (run.id, run.pulse)
        if self._last != this:
            self._has_changed = self._last is not None
            self._last, self._changed_at = this, now
        seen_s = now - self._changed_at
        return seen_s if self._has_changed else max(abs(age_ms) / 1000, seen_s)
