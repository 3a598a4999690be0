"""Heartbeats of tasks in the cluster: they show that tasks are running, which Ray does not.

A block may take any time, and a task that waits for a free CPU looks like one that runs. See docs/internals/leases.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from msgspec import Struct
from ray.exceptions import RayError

from enrich import __version__
from enrich.errors import ClusterFailed, JobError
from enrich.run.context import ClusterCallbacks

#: How often a running task sends a heartbeat, in seconds.
HEARTBEAT_EVERY_S = 5.0
#: How often heartbeats and stop requests are checked, in seconds.
CHECK_EVERY_S = 0.2
#: After how many seconds without a heartbeat the user is warned; also the limit when the run is aborting.
WARN_AFTER_S = 30.0
#: After how many seconds without a heartbeat the run gives up.
CAPACITY_TIMEOUT_S = 300.0
RUN_AGAIN_HINT = "run the same command again: it resumes"


class HeartbeatCounter:
    """Counts heartbeats from all machines of the cluster. An actor."""

    def __init__(self) -> None:
        self._count = 0

    def add(self) -> None:
        """Count a heartbeat."""
        self._count += 1

    def total(self) -> int:
        """Return the number of heartbeats."""
        return self._count


class Heartbeats(Struct, frozen=True):
    """What a task needs to send heartbeats: the counter, and the run's version."""

    counter: Any
    version: str = __version__

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send heartbeats while the block runs. Raises JobError when this machine has another version than the run."""
        require_same_version(self.version)
        over = threading.Event()

        def send() -> None:
            while not over.is_set():
                self.counter.add.remote()
                over.wait(HEARTBEAT_EVERY_S)

        threading.Thread(target=send, name="heartbeats", daemon=True).start()
        try:
            yield
        finally:
            over.set()


def new_heartbeat_counter() -> Any:  # noqa: ANN401 - a Ray actor
    """Start a counter that exists as long as it is referenced.

    One counter serves all phases, because a cluster without its head node cannot start another.
    """
    return ray.remote(HeartbeatCounter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


@dataclass(slots=True)
class HeartbeatMonitor:
    """Monitors the heartbeats of the blocks of one phase."""

    heartbeats: Heartbeats
    callbacks: ClusterCallbacks = field(default_factory=ClusterCallbacks)
    #: The last count of heartbeats, and the number of checks since then without a new one.
    _count: int = 0
    _silent_checks: int = 0
    _pending_count: Any = None

    def check(self) -> None:
        """Check once; call it every CHECK_EVERY_S. Raises ClusterFailed, and what `raise_if_stopped` raises."""
        self.callbacks.raise_if_stopped()
        # Count checks instead of seconds: while the machine is suspended, there are no heartbeats either.
        self._silent_checks = 0 if self._has_new_heartbeat() else self._silent_checks + 1
        if self._silent_checks == round(WARN_AFTER_S / CHECK_EVERY_S):
            self.callbacks.on_message(
                f"the cluster has no free capacity: waiting up to {CAPACITY_TIMEOUT_S / 60:.0f} minutes"
            )
        silent_s = self._silent_checks * CHECK_EVERY_S
        if silent_s >= (WARN_AFTER_S if self.callbacks.is_aborting() else CAPACITY_TIMEOUT_S):
            raise ClusterFailed(
                f"no task of the cluster ran for {silent_s:.0f} s: check its capacity and its head node", RUN_AGAIN_HINT
            )

    def reset(self) -> None:
        """Reset the count after a result, because checks can follow each other quickly then."""
        self._silent_checks = 0

    def _has_new_heartbeat(self) -> bool:
        """Return whether there was a new heartbeat since the last check."""
        before = self._count
        if self._pending_count is None:
            self._pending_count = self.heartbeats.counter.total.remote()
        done, _ = ray.wait([self._pending_count], timeout=0)
        if done:
            with suppress(RayError):  # the actor was lost with its machine, and Ray restarts it
                self._count = ray.get(self._pending_count)
            self._pending_count = None
        return self._count != before


def require_same_version(version: str) -> None:
    """Raise JobError when this machine has another version of enrich than the run."""
    if version != __version__:
        message = f"enrich {version} can't work with enrich {__version__}, which is on the cluster"
        raise JobError(message, "install one version on all machines")
