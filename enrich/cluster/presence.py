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
from enrich.engine import Boss
from enrich.errors import ClusterFailed, JobError

#: How often who is at work gives a sign, in seconds.
SIGN_S = 5.0
#: How often it is looked whether somebody is, and whether the boss wants to stop.
LOOK_S = 0.2
#: The person is told when nobody was at work for so long; when the time is up, no longer is waited.
ROOM_S = 30.0
#: A cluster that has no room for so long is given up.
NO_ROOM_S = 300.0
#: What ended its process so often is not begun again; Ray itself would go on for ever.
TRIES = 4
AGAIN = "run again: what is done is not done twice"


class Ear:
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
class Presence:
    """What travels to those who do the blocks of a step."""

    ear: Any
    step: str = field(default_factory=lambda: uuid4().hex)
    version: str = __version__

    @contextmanager
    def at_work(self, on: str | None = None) -> Iterator[None]:
        """Give signs while the block runs, which begins `on` something or goes on.

        Raises JobError where another version is than that of the run, and ClusterFailed when it was begun too often.
        """
        same_version(self.version)
        if on is not None and ray.get(self.ear.begun.remote(f"{self.step} {on}")) > TRIES:
            raise ClusterFailed(f"who was at work on {on} was lost {TRIES} times", "has each machine memory enough?")
        over = threading.Event()

        def give() -> None:
            while not over.is_set():
                self.ear.hear.remote()
                over.wait(SIGN_S)

        threading.Thread(target=give, name="presence", daemon=True).start()
        try:
            yield
        finally:
            over.set()


def new_ear() -> Any:  # noqa: ANN401 - an actor of Ray
    """Have an ear, for as long as somebody knows it. One serves all steps: without its head a cluster makes none."""
    return ray.remote(Ear).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


@dataclass(slots=True)
class Watch:
    """Looks after the blocks of one step, which others do, for a boss."""

    presence: Presence
    boss: Boss = field(default_factory=Boss)
    #: How many signs were heard, and at how many looks since then none.
    _heard: int = 0
    _silent: int = 0
    _asked: Any = None

    def look(self) -> None:
        """Look once; to be called every LOOK_S. Raises ClusterFailed, and what the boss raises to give up."""
        self.boss.check()
        # Looks are counted, not seconds: all are silent while the machine sleeps.
        self._silent = 0 if self._lives() else self._silent + 1
        if self._silent == round(ROOM_S / LOOK_S):
            self.boss.tell(f"the cluster has no room for the input: waiting {NO_ROOM_S / 60:.0f} minutes at most")
        silent_s = self._silent * LOOK_S
        if silent_s >= (ROOM_S if self.boss.late() else NO_ROOM_S):
            raise ClusterFailed(
                f"nobody in the cluster was at work for {silent_s:.0f} s: has it room, or a head?", AGAIN
            )

    def hear(self) -> None:
        """Hear that something was done: looks follow each other quickly then."""
        self._silent = 0

    def _lives(self) -> bool:
        """Tell whether a sign came since the last look."""
        before, ear = self._heard, self.presence.ear
        if self._asked is None:
            self._asked = ear.heard.remote()
        done, _ = ray.wait([self._asked], timeout=0)
        if done:
            with suppress(RayError):  # it was lost with its machine, and is made again
                self._heard = ray.get(self._asked)
            self._asked = None
        return self._heard != before


def same_version(version: str) -> None:
    """Raise JobError when this machine has another version than that of the run."""
    if version != __version__:
        raise JobError(f"enrich {version} can't work with enrich {__version__}, which is on the cluster")
