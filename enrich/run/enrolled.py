"""What a run has enrolled of each step of its job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from enrich.models import State
from enrich.run.budget import Cost


@dataclass(frozen=True, slots=True)
class EnrolledStep:
    """What was enrolled of a step: requests by state, how many were answered before, and what was to be sent.

    `cost` is what that was expected to cost.
    """

    requests: dict[State, int]
    reused: int
    to_submit: int
    cost: Cost


@dataclass(slots=True)
class EnrolledSteps:
    """What was enrolled, by the name of the step; '' for a job without steps."""

    by_step: dict[str, EnrolledStep] = field(default_factory=dict)

    def requests(self) -> dict[State, int] | None:
        """Count the requests by state. None: nothing was enrolled yet."""
        if not self.by_step:
            return None
        return dict(sum((Counter(step.requests) for step in self.by_step.values()), Counter()))

    def reused(self) -> int | None:
        """Count the requests that were answered before. None: nothing was enrolled yet."""
        return sum(step.reused for step in self.by_step.values()) if self.by_step else None

    def cost(self) -> Cost | None:
        """Return what was expected to be spent. None: nothing was enrolled yet."""
        costs = [step.cost for step in self.by_step.values()]
        return sum(costs[1:], costs[0]) if costs else None
