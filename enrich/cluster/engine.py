"""Ray as the engine of an execution: its actors send and poll, its datasets read the input and write the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from enrich.cluster.actors import Remote, start_actor
from enrich.cluster.blocks import Pass
from enrich.cluster.collect import collect_on_ray
from enrich.cluster.enroll import enroll_on_ray
from enrich.cluster.presence import Presence, Watch, new_ear
from enrich.collector import Counted
from enrich.engine import Boss, Enrolled, Hand
from enrich.job import Job
from enrich.model import Wish
from enrich.place import Place, Postgres
from enrich.question import Question
from enrich.rows import Rows
from enrich.store.dialect import OUTAGE_S
from enrich.store.ledger import Ledger
from enrich.store.postgres import Fence
from enrich.worker import Errand


@dataclass(frozen=True, slots=True)
class Ray:
    """A cluster that we are connected to; see `enrich.engine.Engine`."""

    ledger: Postgres
    workers: int
    #: The lease of the process that leads the execution; a block that comes after its end changes nothing.
    owner: int | None = None
    ear: Any = field(default_factory=new_ear)

    def hire(self, errand: Errand, heard: Callable[[Hand], None]) -> Hand:
        """Start a worker."""
        return Remote(start_actor(), errand, heard)

    def led_by(self, owner: int) -> Ray:
        """Do the same for an execution, until the lease of the process that leads it ends."""
        return replace(self, owner=owner)

    def enroll(self, job: Job, rows: Rows, question: Question, wish: Wish, boss: Boss) -> Enrolled:
        """Enroll all rows in a pass that was begun."""
        return enroll_on_ray(rows, self._pass(job, question, wish), self._watch(boss))

    def collect(  # noqa: PLR0913, PLR0917 - all of them travel
        self, job: Job, rows: Rows, question: Question, wish: Wish, target: Place, boss: Boss
    ) -> Counted:
        """Write the output, a dataset."""
        return collect_on_ray(rows, self._pass(job, question, wish), target, self._watch(boss))

    def _watch(self, boss: Boss) -> Watch:
        return Watch(Presence(self.ear), boss)

    def _pass(self, job: Job, question: Question, wish: Wish) -> Pass:
        fence = None if self.owner is None else Fence(self.owner, self.ledger.lease_s)
        return Pass(job, question, wish, partial(Ledger, self.ledger, fence=fence, patience_s=OUTAGE_S))
