"""Whoever does blocks gives signs of life, so that nobody waits for a cluster that has no room, or can't do them.

A block takes as long as it takes: a large file is read to its end, a database that is away is waited for. So what comes
back says little about who is at work.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from enrich import __version__
from enrich.errors import ClusterFailed, JobError
from enrich.run.cluster import ClusterCallbacks

#: How often who is at work gives a sign, in seconds.
HEARTBEAT_EVERY_S = 5.0
#: How often it is looked whether somebody is, and whether the boss wants to stop.
CHECK_EVERY_S = 0.2
#: The person is told when nobody was at work for so long; when the time is up, no longer is waited.
WARN_AFTER_S = 30.0
#: A cluster that has no room for so long is given up.
CAPACITY_TIMEOUT_S = 300.0
#: What ended its process so often is not begun again; Ray itself would go on for ever.
MAX_ATTEMPTS = 4
RUN_AGAIN_HINT = "run again: what is done is not done twice"


class HeartbeatCounter:
    """Hears the signs of all, on whatever machine of the cluster."""

    def __init__(self) -> None:
        self._heard = 0
        self._begun: Counter[str] = Counter()

    def hear(self) -> None:
        """Hear a sign."""
        self._heard += 1

    def begun(self, on: str) -> int:
        """Hear that somebody begins; tell for the how manieth time."""
        self._begun[on] += 1
        return self._begun[on]

    def heard(self) -> int:
        """Tell how many were heard."""
        return self._heard


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """What travels to those who do the blocks of a step."""

    counter: Any
    step: str = field(default_factory=lambda: uuid4().hex)
    version: str = __version__

    @contextmanager
    def sending(self, on: str | None = None) -> Iterator[None]:
        """Give signs while the block runs, which begins `on` something or goes on.

        Raises JobError where another version is than that of the run, and ClusterFailed when it was begun too often.
        """
        require_same_version(self.version)
        if on is not None and ray.get(self.counter.begun.remote(f"{self.step} {on}")) > MAX_ATTEMPTS:
            raise ClusterFailed(
                f"who was at work on {on} was lost {MAX_ATTEMPTS} times", "has each machine memory enough?"
            )
        over = threading.Event()

        def give() -> None:
            while not over.is_set():
                self.counter.hear.remote()
                over.wait(HEARTBEAT_EVERY_S)

        threading.Thread(target=give, name="presence", daemon=True).start()
        try:
            yield
        finally:
            over.set()


def new_heartbeat_counter() -> Any:  # noqa: ANN401 - an actor of Ray
    """Have an ear, for as long as somebody knows it. One serves all steps: without its head a cluster makes none."""
    return ray.remote(HeartbeatCounter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


@dataclass(slots=True)
class HeartbeatMonitor:
    """Looks after the blocks of one step, which others do, for a boss."""

    heartbeats: Heartbeats
    callbacks: ClusterCallbacks = field(default_factory=ClusterCallbacks)
    #: How many signs were heard, and at how many looks since then none.
    _count: int = 0
    _silent_checks: int = 0
    _asked: Any = None

    def check(self) -> None:
        """Look once; to be called every LOOK_S. Raises ClusterFailed, and what the boss raises to give up."""
        self.callbacks.raise_if_stopped()
        # Looks are counted, not seconds: all are silent while the machine sleeps.
        self._silent_checks = 0 if self._has_new_heartbeat() else self._silent_checks + 1
        if self._silent_checks == round(WARN_AFTER_S / CHECK_EVERY_S):
            self.callbacks.on_message(
                f"the cluster has no room for the input: waiting {CAPACITY_TIMEOUT_S / 60:.0f} minutes at most"
            )
        silent_s = self._silent_checks * CHECK_EVERY_S
        if silent_s >= (WARN_AFTER_S if self.callbacks.is_aborting() else CAPACITY_TIMEOUT_S):
            raise ClusterFailed(
                f"nobody in the cluster was at work for {silent_s:.0f} s: has it room, or a head?", RUN_AGAIN_HINT
            )

    def reset(self) -> None:
        """Hear that something was done: looks follow each other quickly then."""
        self._silent_checks = 0

    def _has_new_heartbeat(self) -> bool:
        """Tell whether a sign came since the last look."""
        before, ear = self._count, self.heartbeats.counter
        if self._asked is None:
            self._asked = ear.heard.remote()
        done, _ = ray.wait([self._asked], timeout=0)
        if done:
            with suppress(RayError):  # it was lost with its machine, and is made again
                self._count = ray.get(self._asked)
            self._asked = None
        return self._count != before


def require_same_version(version: str) -> None:
    """Raise JobError when this machine has another version than that of the run."""
    if version != __version__:
        raise JobError(f"enrich {version} can't work with enrich {__version__}, which is on the cluster")
