"""An open task, and when to poll it, learned from the durations of recent tasks. Pure.

The duration of a task is known only as an interval: it was running at one poll and done at the next. The most likely
distribution for such intervals is found by self-consistency (Turnbull, "The Empirical Distribution Function with
Arbitrarily Grouped, Censored and Truncated Data", 1976), one answer at a time, with fading older answers. So the times
of the polls do not bias it, nor does a computer that slept. The poll times are those of the lowest average
cost, where a poll has a price and each second of delay costs one (Barlow, Hunter and Proschan, "Optimum Checking
Procedures", 1963).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate, pairwise
from math import inf
from operator import mul

from enrich.models import Task

#: The ages that are distinguished, in seconds: each 8% above the one before, from 0.05 s to an hour and a half.
AGES_S = tuple(0.05 * 1.08**step for step in range(151))
_MIDDLES_S = (AGES_S[0] / 2, *((low + high) / 2 for low, high in pairwise(AGES_S)))

#: Answers fade with age. All of them together weigh as much as this many new ones.
EFFECTIVE_ANSWERS = 60
#: Weights below the first are dropped. Above the second, all weights are scaled down.
MIN_WEIGHT, MAX_WEIGHT = 0.005, 1e9
#: Durations from earlier runs weigh at most as much as this many answers of this run.
MAX_STORED_WEIGHT = 15.0
#: The weight of each age before the first answer.
PRIOR_WEIGHT = 1 / len(AGES_S)
#: With fewer answers there is no plan.
MIN_ANSWERS = 4.0
REPLAN_EVERY = 16
#: A task that runs longer than all but this share is polled at growing intervals.
TAIL_SHARE = 0.05
#: One task in this many is polled early, at this share of its delay. Otherwise a faster API would go unnoticed.
PROBE_EVERY, PROBE_AT_SHARE = 20, 0.5
#: If a task is done though fewer than this share should be, the learned weights shrink to this many answers.
SURPRISE_SHARE, WEIGHT_AFTER_SURPRISE = 0.02, 1.0
#: While nothing is known, this number of tasks is polled early, at this share of the first guess: the API may be fast.
#: They are enough for a plan.
FIRST_PROBES, FIRST_PROBE_AT_SHARE = 5, 0.1
#: When nothing is left to submit, the open tasks are polled with this share of the rate, each at most this often.
LAST_POLLS_SHARE, LAST_POLL_S = 0.2, 1.0
#: From this multiple of the median duration on, the intervals grow by this share of the additional age.
OVERDUE_AT, OVERDUE_GROWTH = 10.0, 0.03
HIGH_CAPACITY_SHARE, LOW_CAPACITY_SHARE = 0.5, 0.1


class PollCost(Enum):
    """The cost of a poll, as a multiple: how many typical task durations of delay it equals."""

    LOW = 0.05  # no submit can be sent before an answer comes, and slots are left over
    NORMAL = 0.6
    HIGH = 3.0  # the poll takes the slot of a submit

    @classmethod
    def choose(cls, *, rate_is_limiting: bool, free_share: float) -> PollCost:
        """Choose by whether all slots are used, and by the free share of the capacity for open requests.

        Either slots or capacity limit the speed of a run. A poll uses a slot, and may free capacity.
        """
        if rate_is_limiting:
            return cls.HIGH if free_share > HIGH_CAPACITY_SHARE else cls.NORMAL
        return cls.LOW if free_share < LOW_CAPACITY_SHARE else cls.NORMAL


class PollSchedule:
    """When to poll tasks, by their age."""

    FIRST_GUESS_S = 1.0
    GROWTH = 0.35
    MIN_DELAY_S = 0.5
    MAX_DELAY_S = 30.0

    def __init__(self, weights_by_age: Iterable[tuple[float, float]] = ()) -> None:
        """Start with the `weights_by_age` of an earlier run."""
        #: Divided by the weight of the newest answer: the number of answers per age.
        self._weights = [0.0] * len(AGES_S)
        self._newest_weight = 1.0
        #: How many answers were recorded since the start.
        self.answers_recorded = 0
        self._tasks_started = 0
        #: The share of tasks that are done before each age; empty: there is no plan.
        self._done_shares: list[float] = []
        #: For each age at which a task may still be running, the next age to poll, as indexes of AGES_S.
        self._plans: dict[PollCost, list[int]] = {}
        #: The median and the mean duration of a task, in seconds.
        self.median_s = self.mean_s = self.FIRST_GUESS_S
        for seconds, answers in weights_by_age:
            if 0 < seconds < inf and 0 < answers < MAX_WEIGHT:  # users can edit the stored values
                self._weights[min(bisect_left(AGES_S, seconds), len(AGES_S) - 1)] += answers
        stored_weight = sum(self._weights)
        if stored_weight > MAX_STORED_WEIGHT:
            self._weights = [weight * MAX_STORED_WEIGHT / stored_weight for weight in self._weights]
        self._replan()

    @property
    def weights_by_age(self) -> list[tuple[float, float]]:
        """How many answers took at most each age (seconds), but longer than the age before; old answers count less."""
        pairs = zip(AGES_S, self._weights, strict=True)
        return [
            (age, weight / self._newest_weight) for age, weight in pairs if weight > MIN_WEIGHT * self._newest_weight
        ]

    @property
    def has_plan(self) -> bool:
        """Whether enough is known to plan polls."""
        return bool(self._done_shares)

    def record_duration(self, running_at_s: float, done_at_s: float) -> None:
        """Record that a task was running at one age (0: not polled before) and done at another, in seconds."""
        if done_at_s <= running_at_s:  # the clock was changed
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
        self.answers_recorded += 1
        if self.answers_recorded < REPLAN_EVERY or not self.answers_recorded % REPLAN_EVERY:
            self._replan()

    def first_delay_s(self, cost: PollCost = PollCost.NORMAL) -> float:
        """Return in how many seconds a new task is worth its first poll. The first tasks are polled earlier.

        Later, one task in PROBE_EVERY is.
        """
        self._tasks_started += 1
        if not self.has_plan and self._tasks_started <= FIRST_PROBES:
            return FIRST_PROBE_AT_SHARE * self.FIRST_GUESS_S
        return self.next_delay_s(0.0, cost) * (
            PROBE_AT_SHARE if self._done_shares and not self._tasks_started % PROBE_EVERY else 1.0
        )

    def next_delay_s(self, age_s: float, cost: PollCost = PollCost.NORMAL) -> float:
        """Return in how many seconds a task of this age is worth a poll."""
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

    def last_delay_s(self, age_s: float, open_tasks: int, rate: float) -> float:
        """Return in how many seconds a task of this age is polled at the latest when nothing is left to submit.

        The run ends with the answer of its last task, and any of the `open_tasks` may be the last. All their polls
        take a share of the `rate` (requests per second). A task that is far older than most is polled more rarely.
        """
        soon = max(LAST_POLL_S, open_tasks / (LAST_POLLS_SHARE * rate))
        overdue_s = age_s - OVERDUE_AT * self.median_s
        return max(soon, LAST_POLL_S + OVERDUE_GROWTH * overdue_s)

    def _replan(self) -> None:
        if sum(self._weights) < MIN_ANSWERS * self._newest_weight:
            return
        weights = [weight + PRIOR_WEIGHT * self._newest_weight for weight in self._weights]
        total = sum(weights)
        self._done_shares = list(accumulate((weight / total for weight in weights), initial=0.0))
        self.median_s = AGES_S[bisect_left(self._done_shares, 0.5) - 1]
        # Without the prior weights, which reach far beyond any duration that was seen.
        self.mean_s = sum(map(mul, self._weights, _MIDDLES_S)) / sum(self._weights)
        self._plans.clear()


def _cheapest_plan(done_shares: list[float], poll_cost: float) -> list[int]:
    """Return for each age the next age to poll at the lowest cost: `poll_cost` a poll, one a second of delay.

    `done_shares[i]` is the share of tasks that are done before the age AGES_S[i]. Computed from the oldest age down: to
    poll a task next at some age costs a poll, the delay of the tasks that were done before it, and then the cost of a
    task of that age.
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


#: A 404 counts after this many in a row, over at least `Timeouts.young_task_s`. So does an unreadable answer.
CONFIRMING_REPLIES = 5
#: An answer about a task that the ledger does not have counts after this many identical ones.
CONFIRMING_FOREIGN_REPLIES = 3


@dataclass(slots=True)
class Repeated:
    """What the last replies have in common, how many came in a row, and since when (monotonic, seconds)."""

    value: object = None
    count: int = 0
    since: float = 0.0

    def add(self, value: object, now: float) -> Repeated:
        """Count a reply. One with another value than the last begins anew."""
        if not self.count or value != self.value:
            self.value, self.count, self.since = value, 0, now
        self.count += 1
        return self

    def is_conclusive(self, now: float, min_duration_s: float) -> bool:
        """Return whether the reply came often enough, over at least `min_duration_s` seconds."""
        return self.count >= CONFIRMING_REPLIES and now - self.since >= min_duration_s


@dataclass(slots=True)
class OpenTask:
    """A task without a result yet. The poll schedule learns only from tasks with `submitted_in_this_run`."""

    task: Task
    submitted_in_this_run: bool
    acknowledged: bool
    #: Time of submission by the monotonic clock, in seconds.
    submitted_at_s: float
    #: The task was counted as lost. Polling it is free, and the API may have deleted it.
    written_off: bool = False
    #: The request is about to be resent, so a 404 needs as many confirmations as for any other task.
    to_be_resubmitted: bool = False
    #: Age in seconds when a poll last found it running.
    last_running_age_s: float = 0.0
    #: Send the next poll over a new connection.
    needs_new_connection: bool = False
    #: The poll that is running began after it was known to be the last one.
    is_last_poll: bool = False
    #: The phases that replies named, polls that failed, replies that need confirmation, and answers about a task that
    #: the ledger lacks.
    phase: Repeated = field(default_factory=Repeated)
    failed_poll: Repeated = field(default_factory=Repeated)
    unconfirmed_reply: Repeated = field(default_factory=Repeated)
    foreign_reply: Repeated = field(default_factory=Repeated)
