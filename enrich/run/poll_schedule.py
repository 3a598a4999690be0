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
AGES_S = tuple(0.05 * 1.08**step for step in range(151))
_MIDDLES_S = (AGES_S[0] / 2, *((low + high) / 2 for low, high in pairwise(AGES_S)))

#: The latest answers, fading, weigh together as much as so many.
EFFECTIVE_ANSWERS = 60
#: Weights below this are not worth keeping; above that they are scaled down.
MIN_WEIGHT, MAX_WEIGHT = 0.005, 1e9
#: What other nights taught weighs at most as much as so many answers of this one.
MAX_STORED_WEIGHT = 15.0
#: What is believed before anything is known: each age has this weight.
PRIOR_WEIGHT = 1 / len(AGES_S)
#: With fewer answers nothing is planned.
MIN_ANSWERS = 4.0
REPLAN_EVERY = 16
#: Tasks that outlive all but this share are asked ever less often.
TAIL_SHARE = 0.05
#: One task in so many is asked long before its time: else an API that has become faster would never be noticed.
PROBE_EVERY, PROBE_AT_SHARE = 20, 0.5
#: When that finds one done, though less than this share should be, what was learned shrinks to so many answers.
SURPRISE_SHARE, WEIGHT_AFTER_SURPRISE = 0.02, 1.0
HIGH_CAPACITY_SHARE, LOW_CAPACITY_SHARE = 0.5, 0.1


class PollCost(Enum):
    """What a poll costs: as much as so many typical latencies of delay."""

    LOW = 0.05  # no submit can leave before an answer came, and slots are left over
    NORMAL = 0.6
    HIGH = 3.0  # it takes the slot of a submit

    @classmethod
    def choose(cls, *, rate_is_limiting: bool, free_share: float) -> PollCost:
        """Choose by whether all slots are used, and the share of what may be at the API that is free.

        Either the slots or the room is what makes a run long; a poll costs the one and makes the other.
        """
        if rate_is_limiting:
            return cls.HIGH if free_share > HIGH_CAPACITY_SHARE else cls.NORMAL
        return cls.LOW if free_share < LOW_CAPACITY_SHARE else cls.NORMAL


class PollSchedule:
    """When to ask how a task is."""

    FIRST_GUESS_S = 1.0
    GROWTH = 0.35
    MIN_DELAY_S = 0.5
    MAX_DELAY_S = 30.0

    def __init__(self, weights_by_age: Iterable[tuple[float, float]] = ()) -> None:
        """Begin with what `learned` told on another night."""
        #: Divided by the newest answer's weight, they tell how many answers took how long.
        self._weights = [0.0] * len(AGES_S)
        self._newest_weight = 1.0
        self._answers_recorded = 0
        self._tasks_started = 0
        #: The share of tasks that are done before each age; empty: nothing is planned.
        self._done_shares: list[float] = []
        #: For each age at which a task may still run the next at which to ask, as indexes of AGES.
        self._plans: dict[PollCost, list[int]] = {}
        self._median_s: float | None = None
        for seconds, answers in weights_by_age:
            if 0 < seconds < inf and 0 < answers < MAX_WEIGHT:  # the file is the person's to change
                self._weights[_age_index(seconds)] += answers
        stored_weight = sum(self._weights)
        if stored_weight > MAX_STORED_WEIGHT:
            self._weights = [weight * MAX_STORED_WEIGHT / stored_weight for weight in self._weights]
        self._replan()

    @property
    def answers_recorded(self) -> int:
        """How many answers taught something since the beginning."""
        return self._answers_recorded

    @property
    def weights_by_age(self) -> list[tuple[float, float]]:
        """How many answers took at most how many seconds (and longer than the age before); old ones count less."""
        pairs = zip(AGES_S, self._weights, strict=True)
        return [
            (age, weight / self._newest_weight) for age, weight in pairs if weight > MIN_WEIGHT * self._newest_weight
        ]

    @property
    def median_s(self) -> float:
        """How long a task takes, in seconds: the median."""
        return self.FIRST_GUESS_S if self._median_s is None else self._median_s

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Hear that a task still ran at one age (0: was not asked before) and was done at another, in seconds."""
        if done_at_s <= running_at_s:  # a clock was set
            return
        first = bisect_right(_MIDDLES_S, running_at_s)
        last = max(bisect_right(_MIDDLES_S, done_at_s), first + 1)
        first = min(first, len(AGES_S) - 1)
        self._newest_weight /= 1 - 1 / EFFECTIVE_ANSWERS
        total = sum(self._weights)
        if self._done_shares and sum(self._weights[:last]) < SURPRISE_SHARE * total:
            self._weights = [weight * WEIGHT_AFTER_SURPRISE * self._newest_weight / total for weight in self._weights]
        weights = [weight + PRIOR_WEIGHT * self._newest_weight for weight in self._weights[first:last]]
        share = self._newest_weight / sum(weights)
        for index, weight in enumerate(weights, first):
            self._weights[index] += weight * share
        if self._newest_weight > MAX_WEIGHT:
            self._weights = [weight / self._newest_weight for weight in self._weights]
            self._newest_weight = 1.0
        self._answers_recorded += 1
        if self._answers_recorded < REPLAN_EVERY or not self._answers_recorded % REPLAN_EVERY:
            self._replan()

    def first_delay_s(self, cost: PollCost = PollCost.NORMAL) -> float:
        """Tell in how many seconds a task that was submitted just now is worth a poll; now and then feel earlier."""
        self._tasks_started += 1
        return self.next_delay_s(0.0, cost) * (
            PROBE_AT_SHARE if self._done_shares and not self._tasks_started % PROBE_EVERY else 1.0
        )

    def next_delay_s(self, age_s: float, cost: PollCost = PollCost.NORMAL) -> float:
        """Tell in how many seconds a task of this age is worth a poll."""
        if self._done_shares:
            if cost not in self._plans:
                self._plans[cost] = _cheapest_plan(self._done_shares, cost.value * self.median_s)
            plan = self._plans[cost]
            index = bisect_right(AGES_S, age_s)
            if index < len(plan):
                return max(AGES_S[plan[index]] - age_s, self.MIN_DELAY_S if age_s else 0.0)
        elif age_s < self.median_s * 0.8:
            return self.median_s * 0.9 - age_s
        return min(self.MAX_DELAY_S, max(self.MIN_DELAY_S, age_s * self.GROWTH))

    def _replan(self) -> None:
        if sum(self._weights) < MIN_ANSWERS * self._newest_weight:
            return
        weights = [weight + PRIOR_WEIGHT * self._newest_weight for weight in self._weights]
        total = sum(weights)
        self._done_shares = list(accumulate((weight / total for weight in weights), initial=0.0))
        self._median_s = AGES_S[bisect_left(self._done_shares, 0.5) - 1]
        self._plans.clear()


def _age_index(seconds: float) -> int:
    return min(bisect_left(AGES_S, seconds), len(AGES_S) - 1)


def _cheapest_plan(done_shares: list[float], poll_cost: float) -> list[int]:
    """Tell for each age the next at which to ask, that a task costs least: `price` a poll, one a second of delay.

    `done[i]` is the share of tasks that are done before the age AGES[i]. Worked out from the oldest age down: a task
    that is asked next at some age costs a poll, the delay of those that were done before it, and then what a task of
    that age costs.
    """
    last = bisect_left(done_shares, 1 - TAIL_SHARE)
    weighted_ages = [
        (after - before) * middle
        for before, after, middle in zip(done_shares, done_shares[1:], _MIDDLES_S, strict=False)
    ]
    cumulated_ages = list(accumulate(weighted_ages, initial=0.0))
    costs = [0.0] * (last + 1)
    plan = [0] * last
    for current in range(last - 1, -1, -1):
        costs[current] = inf
        for next_poll in range(current + 1, last + 1):
            delay = AGES_S[next_poll - 1] * (done_shares[next_poll] - done_shares[current]) - (
                cumulated_ages[next_poll] - cumulated_ages[current]
            )
            cost = poll_cost * (1 - done_shares[current]) + delay
            if cost >= costs[current]:
                break
            if cost + costs[next_poll] < costs[current]:
                costs[current], plan[current] = cost + costs[next_poll], next_poll - 1
    return plan
