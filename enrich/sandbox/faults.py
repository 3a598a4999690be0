"""Defines the faults, and chooses the requests that get one.

The settings name them as `[SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]`; `POST /__faults` injects them into the next N
requests. "Before": the request is not carried out. "After": the request is carried out, a run is accepted and charged,
and only the response is broken (a response other than 200 stays as it is, because nothing was carried out). "Task": the
fault belongs to the accepted task.

`FAULT_KINDS` has the default scope. Any other may be given, except for no-task-id and the faults of moment "task":
they apply to `post` only. `post` is run and bulk-run, `get` the GET of a task, `me` the user, `waterfalls` and
`enrichments` the list or one of them, `all` everything under `/v1`. A silence ends early when the client disconnects.
A flickering task is known at the first poll if it still runs; from the next poll on, or from the first one if it has
finished, it is 404. A slow request is carried out after its delay, even when the client has disconnected by then. Each
fault has its own series of random numbers (from `fault_seed` and the number of the matching request).
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

Scope = Literal["post", "get", "me", "waterfalls", "enrichments", "all"]
Moment = Literal["before", "after", "task"]
Param = int | float | str

ENDPOINTS: Mapping[str, frozenset[str]] = {
    "post": frozenset({"run", "bulk_run"}),
    "get": frozenset({"task"}),
    "me": frozenset({"me"}),
    "waterfalls": frozenset({"waterfalls"}),
    "enrichments": frozenset({"enrichments"}),
    "all": frozenset({"run", "bulk_run", "task", "cancel", "me", "waterfalls", "enrichments", "flows", "other"}),
}


@dataclass(frozen=True, slots=True)
class FaultKind:
    """The defaults of a fault. `only_post`: no other scope is allowed."""

    scope: Scope
    moment: Moment
    params: Mapping[str, Param] = field(default_factory=dict)
    only_post: bool = False


#: The faults, with what the client sees.
FAULT_KINDS: Mapping[str, FaultKind] = {
    "rate-limit": FaultKind("all", "before", {"retry_after": 1}),  # 429 with `Retry-After` in seconds
    "rate-limit-date": FaultKind("all", "before", {"retry_after": 1}),  # 429 with `Retry-After` as an HTTP date
    "rate-limit-bare": FaultKind("all", "before"),  # 429 without that header
    "error-before": FaultKind("all", "before", {"status": 500}),  # a 5xx with a JSON body; or named `error-before-503`
    "error-after": FaultKind("post", "after", {"status": 500}),  # the same, but charged; or named `error-after-503`
    "html": FaultKind("all", "before", {"status": 502}),  # an HTML error page
    "html-200": FaultKind("post", "after"),  # 200 with an HTML page
    "reset-before": FaultKind("post", "before"),  # the connection reset, no answer
    "reset-after": FaultKind("post", "after"),  # the same, but charged
    "silence-before": FaultKind("post", "before", {"seconds": 300}),  # no answer for that time, then a reset
    "silence-after": FaultKind("post", "after", {"seconds": 300}),  # the same, but charged
    "slow": FaultKind("all", "before", {"seconds": 2}),  # the right answer, late
    "broken-json": FaultKind("post", "after"),  # 200 with half of the body's JSON
    "wrong-json": FaultKind("post", "after"),  # 200 with JSON of another shape, a list
    "redirect": FaultKind("all", "before", {"location": ""}),  # 307 to that URL, or to `http://elsewhere.example/…`
    "no-task-id": FaultKind("post", "after", only_post=True),  # 200 `{"status":"created"}`
    "lost-task": FaultKind("post", "task", only_post=True),  # an accepted task that is always 404
    "late-task": FaultKind("post", "task", {"seconds": 3}, only_post=True),  # an accepted task that is 404 at first
    "odd-status": FaultKind("post", "task", {"polls": 2}, only_post=True),  # unknown statuses in the first polls
    "unauthorized": FaultKind("all", "before"),  # 401
    "forbidden": FaultKind("all", "before"),  # 403
    "no-credits": FaultKind("post", "before"),  # 406
    "unavailable": FaultKind("all", "before", {"seconds": 1}),  # 503 for all requests during that time
    "other-success": FaultKind("post", "after", {"status": 202}),  # the right answer with another 2xx
    "flickering-task": FaultKind("post", "task", {"seconds": 5}, only_post=True),  # a known task becomes 404 that long
    "odd-credits": FaultKind("get", "after", {"credits": "NaN"}),  # a task with this value of `credits_spent`
    "invalid-utf8": FaultKind("get", "after"),  # the right answer with bytes that are not UTF-8
    "long-id": FaultKind("get", "after", {"length": 600}),  # the right answer with an id of that length
    "deep-json": FaultKind("get", "after", {"depth": 100_000}),  # the right answer with lists nested that deep
    "many-steps": FaultKind("get", "after", {"steps": 200_000}),  # the right answer with that many additional steps
    "gzip-bomb": FaultKind("get", "after", {"mebibytes": 64}),  # the right answer, that large when unpacked
    "wrong-date": FaultKind("all", "after", {"seconds": 7_200, "age": 0}),  # `Date` ahead by that time; `Age` if not 0
}

_WITH_STATUS = re.compile(r"(error-before|error-after)-(5\d\d)")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault with its probability; missing `scope` and `params` are filled from FAULT_KINDS."""

    name: str
    probability: float = 0.0
    scope: str = ""
    params: Mapping[str, Param] = field(default_factory=dict)

    def __post_init__(self) -> None:
        params = dict(self.params)
        if match := _WITH_STATUS.fullmatch(self.name):
            object.__setattr__(self, "name", match[1])
            params.setdefault("status", int(match[2]))
        if self.name not in FAULT_KINDS:
            raise ValueError(f"no fault is called {self.name!r}; there are {', '.join(FAULT_KINDS)}")
        kind = FAULT_KINDS[self.name]
        if unknown := params.keys() - kind.params.keys():
            raise ValueError(f"fault {self.name!r} has no param {', '.join(sorted(unknown))}")
        scope = self.scope or kind.scope
        if scope not in ENDPOINTS:
            raise ValueError(f"no scope is called {scope!r}; there are {', '.join(ENDPOINTS)}")
        if kind.only_post and scope != "post":
            raise ValueError(f"fault {self.name!r} is of the scope post alone")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"the probability of {self.name!r} must be between 0 and 1")
        object.__setattr__(self, "scope", scope)
        object.__setattr__(self, "params", {**kind.params, **params})

    @property
    def moment(self) -> Moment:
        """When it happens: before or after the request is carried out, or later with the task."""
        return FAULT_KINDS[self.name].moment

    def applies_to(self, endpoint: str) -> bool:
        """Return True when a request to this endpoint can have the fault."""
        return endpoint in ENDPOINTS[self.scope]

    def seconds(self) -> float:
        """Return the param `seconds`."""
        return float(self.params["seconds"])

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Parse `[SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]`. Raises ValueError."""
        head, *rest = text.split(",")
        name, equals, probability = head.partition("=")
        scope, _, name = name.rpartition(":")
        pairs = [pair.partition("=") for pair in rest]
        if not equals or any(not sign for _, sign, _ in pairs):
            raise ValueError(f"fault {text!r} is not of the form [SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]")
        return cls(name, float(probability), scope, {key: _parse_param(value) for key, _, value in pairs})


def _parse_param(text: str) -> Param:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class FaultInjector:
    """Chooses the fault of each request, and counts the faults applied."""

    def __init__(self, faults: Iterable[Fault], seed: int) -> None:
        self.applied_counts: Counter[str] = Counter()
        self._seed = seed
        self._random_faults = list(faults)
        #: The matching requests so far, by the index of the fault.
        self._requests: Counter[int] = Counter()
        self._injected: deque[Fault] = deque()

    def inject(self, fault: Fault, times: int) -> None:
        """Apply a fault to the next `times` matching requests."""
        self._injected.extend([fault] * times)

    def clear(self) -> None:
        """Remove all faults."""
        self._injected.clear()
        self._random_faults.clear()

    def pending(self) -> list[str]:
        """Return the names of the injected faults that have not been applied yet."""
        return [fault.name for fault in self._injected]

    def draw(self, endpoint: str) -> Fault | None:
        """Return the fault of this request, or None; injected faults come before random ones."""
        if not self._injected and not self._random_faults:
            return None
        fault = self._take_injected(endpoint) or self._draw_random(endpoint)
        if fault:
            self.applied_counts[fault.name] += 1
        return fault

    def _take_injected(self, endpoint: str) -> Fault | None:
        for index, fault in enumerate(self._injected):
            if fault.applies_to(endpoint):
                del self._injected[index]
                return fault
        return None

    def _draw_random(self, endpoint: str) -> Fault | None:
        drawn = None
        for index, fault in enumerate(self._random_faults):
            if fault.applies_to(endpoint):
                self._requests[index] += 1
                label = f"{self._seed} {index} {self._requests[index]}"
                number = int.from_bytes(blake2b(label.encode(), digest_size=8).digest()) / 2**64
                if number < fault.probability:
                    drawn = drawn or fault
        return drawn
