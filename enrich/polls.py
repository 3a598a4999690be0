"""When to ask how a task is: learned from how long the last ones took; pure.

How long a task took is known only as an interval: it still ran at one poll and was done at the next. The
distribution that is most likely for such intervals is found by self-consistency (Turnbull, "The Empirical
Distribution Function with Arbitrarily Grouped, Censored and Truncated Data", 1976), one answer at a time, the older
ones fading: so our own poll times do not bend it, and a laptop that slept teaches nothing wrong. The times to ask are
those that cost least on average, when a poll has a price and each second of delay costs one (Barlow, Hunter and
Proschan, "Optimum Checking Procedures", 1963).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from enum import Enum
from itertools import accumulate, pairwise
from math import inf

#: The ages that are told apart, in seconds: each a twelfth above the one before, from 0.05 s to an hour and a half.
AGES = tuple(0.05 * 1.08**step for step in range(151))
_MIDDLES = (AGES[0] / 2, *((low + high) / 2 for low, high in pairwise(AGES)))

#: The latest answers, fading, weigh together as much as so many.
MEMORY = 60
#: Weights below this are not worth keeping; above that they are scaled down.
NOTHING, LARGE = 0.005, 1e9
#: What other nights taught weighs at most as much as so many answers of this one.
INHERITED = 15.0
#: What is believed before anything is known: each age has this weight.
UNKNOWN = 1 / len(AGES)
#: With fewer answers nothing is planned.
ENOUGH = 4.0
PLANNED_EVERY = 16
#: Tasks that outlive all but this share are asked ever less often.
TAIL = 0.05
#: One task in so many is asked long before its time: else an API that has become faster would never be noticed.
PROBED_EVERY, PROBED_AT = 20, 0.5
#: When that finds one done, though less than this share should be, what was learned shrinks to so many answers.
SURPRISE, SHAKEN = 0.02, 1.0
MUCH_ROOM, LITTLE_ROOM = 0.5, 0.1


class Price(Enum):
    """What a poll costs: as much as so many typical latencies of delay."""

    LOW = 0.05  # no submit can leave before an answer came, and slots are left over
    FAIR = 0.6
    HIGH = 3.0  # it takes the slot of a submit

    @classmethod
    def of(cls, *, scarce: bool, room: float) -> Price:
        """Choose by whether all slots are used, and the share of what may be at the API that is free.

        Either the slots or the room is what makes a run long; a poll costs the one and makes the other.
        """
        if scarce:
            return cls.HIGH if room > MUCH_ROOM else cls.FAIR
        return cls.LOW if room < LITTLE_ROOM else cls.FAIR


class PollTimes:
    """When to ask how a task is."""

    FIRST_GUESS_S = 1.0
    GROWTH = 0.35
    SHORTEST_S = 0.5
    LONGEST_S = 30.0

    def __init__(self, learned: Iterable[tuple[float, float]] = ()) -> None:
        """Begin with what `learned` told on another night."""
        #: Divided by the newest answer's weight, they tell how many answers took how long.
        self._weights = [0.0] * len(AGES)
        self._newest = 1.0
        self._heard = 0
        self._begun = 0
        #: The share of tasks that are done before each age; empty: nothing is planned.
        self._done: list[float] = []
        #: For each age at which a task may still run the next at which to ask, as indexes of AGES.
        self._plans: dict[Price, list[int]] = {}
        self._typical: float | None = None
        for seconds, answers in learned:
            if 0 < seconds < inf and 0 < answers < LARGE:  # the file is the person's to change
                self._weights[_index(seconds)] += answers
        inherited = sum(self._weights)
        if inherited > INHERITED:
            self._weights = [weight * INHERITED / inherited for weight in self._weights]
        self._plan()

    @property
    def heard(self) -> int:
        """How many answers taught something since the beginning."""
        return self._heard

    @property
    def learned(self) -> list[tuple[float, float]]:
        """How many answers took at most how many seconds (and longer than the age before); old ones count less."""
        pairs = zip(AGES, self._weights, strict=True)
        return [(age, weight / self._newest) for age, weight in pairs if weight > NOTHING * self._newest]

    @property
    def typical(self) -> float:
        """How long a task takes, in seconds: the median."""
        return self.FIRST_GUESS_S if self._typical is None else self._typical

    def finished(self, after: float, by: float) -> None:
        """Hear that a task still ran at one age (0: was not asked before) and was done at another, in seconds."""
        if by <= after:  # a clock was set
            return
        first = bisect_right(_MIDDLES, after)
        last = max(bisect_right(_MIDDLES, by), first + 1)
        first = min(first, len(AGES) - 1)
        self._newest /= 1 - 1 / MEMORY
        total = sum(self._weights)
        if self._done and sum(self._weights[:last]) < SURPRISE * total:
            self._weights = [weight * SHAKEN * self._newest / total for weight in self._weights]
        believed = [weight + UNKNOWN * self._newest for weight in self._weights[first:last]]
        share = self._newest / sum(believed)
        for index, weight in enumerate(believed, first):
            self._weights[index] += weight * share
        if self._newest > LARGE:
            self._weights = [weight / self._newest for weight in self._weights]
            self._newest = 1.0
        self._heard += 1
        if self._heard < PLANNED_EVERY or not self._heard % PLANNED_EVERY:
            self._plan()

    def first(self, price: Price = Price.FAIR) -> float:
        """Tell in how many seconds a task that was submitted just now is worth a poll; now and then feel earlier."""
        self._begun += 1
        return self.wait(0.0, price) * (PROBED_AT if self._done and not self._begun % PROBED_EVERY else 1.0)

    def wait(self, age: float, price: Price = Price.FAIR) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""
        if self._done:
            if price not in self._plans:
                self._plans[price] = _cheapest(self._done, price.value * self.typical)
            plan = self._plans[price]
            at = bisect_right(AGES, age)
            if at < len(plan):
                return max(AGES[plan[at]] - age, self.SHORTEST_S if age else 0.0)
        elif age < self.typical * 0.8:
            return self.typical * 0.9 - age
        return min(self.LONGEST_S, max(self.SHORTEST_S, age * self.GROWTH))

    def _plan(self) -> None:
        if sum(self._weights) < ENOUGH * self._newest:
            return
        believed = [weight + UNKNOWN * self._newest for weight in self._weights]
        total = sum(believed)
        self._done = list(accumulate((weight / total for weight in believed), initial=0.0))
        self._typical = AGES[bisect_left(self._done, 0.5) - 1]
        self._plans.clear()


def _index(seconds: float) -> int:
    return min(bisect_left(AGES, seconds), len(AGES) - 1)


def _cheapest(done: list[float], price: float) -> list[int]:
    """Tell for each age the next at which to ask, that a task costs least: `price` a poll, one a second of delay.

    `done[i]` is the share of tasks that are done before the age AGES[i]. Worked out from the oldest age down: a task
    that is asked next at some age costs a poll, the delay of those that were done before it, and then what a task of
    that age costs.
    """
    last = bisect_left(done, 1 - TAIL)
    waited = [(after - before) * middle for before, after, middle in zip(done, done[1:], _MIDDLES, strict=False)]
    seconds = list(accumulate(waited, initial=0.0))
    costs = [0.0] * (last + 1)
    plan = [0] * last
    for now in range(last - 1, -1, -1):
        costs[now] = inf
        for then in range(now + 1, last + 1):
            delay = AGES[then - 1] * (done[then] - done[now]) - (seconds[then] - seconds[now])
            cost = price * (1 - done[now]) + delay
            if cost >= costs[now]:
                break
            if cost + costs[then] < costs[now]:
                costs[now], plan[now] = cost + costs[then], then - 1
    return plan
