"""Looks at the newest run of a job without disturbing it: a short read, no lock."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from enrich.job.job import Job
from enrich.ledger.database import ledger_exists
from enrich.ledger.history import LatestExecutionRow, LedgerReader
from enrich.ledger.lock import is_locked
from enrich.look.picture import RunStatus, RunView, run_status
from enrich.model import SystemClock
from enrich.run.progress import read_snapshot

#: A run writes its pulse every 2 s; on a busy disk it may take a while.
HEARTBEAT_TIMEOUT_S = 15.0


@dataclass(slots=True)
class RunWatcher:
    """Looks at a job now and then. A run that gave no sign of life for longer than `patience_s` is not at work.

    Two clocks may differ, and one may be set: a pulse that changed between two looks is fresh whatever its time.
    """

    job: Job
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    clock: Callable[[], float] = time.monotonic
    _last_heartbeat: tuple[int, str | None] | None = None
    _changed_at: float = 0.0
    _has_changed: bool = False

    def read_view(self) -> RunView:
        """Look once. Raises Refused when the ledger is none, or can't be read."""
        job, now_ms = self.job, SystemClock().now_ms()
        ttl_ms = int(job.model.policy.result_ttl.total_seconds() * 1000)
        if not ledger_exists(job.ledger):
            return RunView(job.name, job.ledger, ttl_ms, now_ms, RunStatus.NO_LEDGER)
        # Closed again at once: who has a ledger open keeps its run from tidying up at the end.
        with closing(LedgerReader(job.ledger)) as history:
            run = history.latest_execution(job.name)
        if run is None:
            return RunView(job.name, job.ledger, ttl_ms, now_ms, RunStatus.NEVER_RUN)
        snapshot = read_snapshot(run.pulse)
        heartbeat_age_s = self._heartbeat_age_s(run, now_ms - (run.started_ms if snapshot is None else snapshot.at_ms))
        lock_held = run.id == run.newest and is_locked(job.ledger)
        status = run_status(run, snapshot, heartbeat_age_s, self.heartbeat_timeout_s, lock_held=lock_held)
        return RunView(job.name, job.ledger, ttl_ms, now_ms, status, run, snapshot)

    def _heartbeat_age_s(self, run: LatestExecutionRow, age_ms: int) -> float:
        """Tell how long the run has given no sign, by what the clock says and by what was seen."""
        now, heartbeat = self.clock(), (run.id, run.pulse)
        if self._last_heartbeat != heartbeat:
            self._has_changed = self._last_heartbeat is not None
            self._last_heartbeat, self._changed_at = heartbeat, now
        unchanged_s = now - self._changed_at
        return unchanged_s if self._has_changed else max(abs(age_ms) / 1000, unchanged_s)
