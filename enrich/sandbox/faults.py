"""Draws what goes wrong with which request.

Named in the settings as `[SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]`, or for the next N requests by `POST /__faults`.
"Before" means that nothing was accepted; "after" means that the request was carried out, a run accepted and charged,
and that only the answer is spoilt (an answer other than 200 is left alone, as nothing was carried out).

| name            | scope | moment | params, defaults | the client sees                                          |
|-----------------|-------|--------|------------------|----------------------------------------------------------|
| rate-limit      | all   | before | retry_after=1    | 429 with `Retry-After` in seconds                        |
| rate-limit-date | all   | before | retry_after=1    | 429 with `Retry-After` as an HTTP date                   |
| rate-limit-bare | all   | before |                  | 429 without that header                                  |
| error-before    | all   | before | status=500       | a 5xx with a JSON body; also spelt `error-before-503`    |
| error-after     | post  | after  | status=500       | the same, but paid for; also spelt `error-after-503`     |
| html            | all   | before | status=502       | an HTML error page                                       |
| html-200        | post  | after  |                  | 200 with an HTML page                                    |
| reset-before    | post  | before |                  | the connection reset, no answer                          |
| reset-after     | post  | after  |                  | the same, but paid for                                   |
| silence-before  | post  | before | seconds=300      | nothing until it goes away, at last a reset              |
| silence-after   | post  | after  | seconds=300      | the same, but paid for                                   |
| slow            | all   | before | seconds=2        | the right answer, late                                   |
| broken-json     | post  | after  |                  | 200 with half of the body's JSON                         |
| wrong-json      | post  | after  |                  | 200 with JSON of another shape, a list                   |
| redirect        | all   | before | location=…       | 307 to that URL, or to `http://elsewhere.example/…`       |
| no-task-id      | post  | after  |                  | 200 `{"status":"created"}`                               |
| lost-task       | post  | task   |                  | an accepted task that is 404 for ever                    |
| late-task       | post  | task   | seconds=3        | an accepted task that is 404 at first                    |
| odd-status      | post  | task   | polls=2          | statuses never seen before, for the first polls          |
| unauthorized    | all   | before |                  | 401                                                      |
| forbidden       | all   | before |                  | 403                                                      |
| no-credits      | post  | before |                  | 406                                                      |
| unavailable     | all   | before | seconds=1        | 503, and so does everybody, for that long                |
| other-success   | post  | after  | status=202       | the right answer with another 2xx                        |
| flickering-task | post  | task   | seconds=5        | a task that is 404 for that long after it was known      |
| odd-credits     | get   | after  | credits=NaN      | a task with such `credits_spent`                         |
| invalid-utf8    | get   | after  |                  | the right answer, with bytes that are no text in it      |
| long-id         | get   | after  | length=600       | the right answer under an id of that length              |
| deep-json       | get   | after  | depth=100000     | the right answer, with lists nested that deep in it      |
| many-steps      | get   | after  | steps=200000     | the right answer, with that many steps more              |
| gzip-bomb       | get   | after  | mebibytes=64     | the right answer, that large when it is unpacked         |
| wrong-date      | all   | after  | seconds=7200     | the right answer, `Date` ahead by so much; and `Age` when|
|                 |       |        | age=0            | `age` is not 0                                           |

The scope is the default one. Any other may be given, but no-task-id and those of moment "task" are of `post` alone.
A flickering task is known while it runs, at the first poll; then, or at the first poll when it has finished, it is not.
`post` is run and bulk-run, `get` the GET of a task, `me` the user, `waterfalls` the list or one of them, and `all`
everything under `/v1`. A slow request is carried out after its delay, even when the client has gone by then.
Probabilities are drawn for each fault from its own series (`fault_seed`, the number of the matching request).
"""

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

Scope = Literal["post", "get", "me", "waterfalls", "all"]
Moment = Literal["before", "after", "task"]
Param = int | float | str

ENDPOINTS: Mapping[str, frozenset[str]] = {
    "post": frozenset({"run", "bulk_run"}),
    "get": frozenset({"task"}),
    "me": frozenset({"me"}),
    "waterfalls": frozenset({"waterfalls"}),
    "all": frozenset({"run", "bulk_run", "task", "cancel", "me", "waterfalls", "other"}),
}


@dataclass(frozen=True, slots=True)
class FaultKind:
    """What a fault of one name is like, see the table above."""

    scope: Scope
    moment: Moment
    params: Mapping[str, Param] = field(default_factory=dict)
    only_post: bool = False


FAULT_KINDS: Mapping[str, FaultKind] = {
    "rate-limit": FaultKind("all", "before", {"retry_after": 1}),
    "rate-limit-date": FaultKind("all", "before", {"retry_after": 1}),
    "rate-limit-bare": FaultKind("all", "before"),
    "error-before": FaultKind("all", "before", {"status": 500}),
    "error-after": FaultKind("post", "after", {"status": 500}),
    "html": FaultKind("all", "before", {"status": 502}),
    "html-200": FaultKind("post", "after"),
    "reset-before": FaultKind("post", "before"),
    "reset-after": FaultKind("post", "after"),
    "silence-before": FaultKind("post", "before", {"seconds": 300}),
    "silence-after": FaultKind("post", "after", {"seconds": 300}),
    "slow": FaultKind("all", "before", {"seconds": 2}),
    "broken-json": FaultKind("post", "after"),
    "wrong-json": FaultKind("post", "after"),
    "redirect": FaultKind("all", "before", {"location": ""}),
    "no-task-id": FaultKind("post", "after", only_post=True),
    "lost-task": FaultKind("post", "task", only_post=True),
    "late-task": FaultKind("post", "task", {"seconds": 3}, only_post=True),
    "odd-status": FaultKind("post", "task", {"polls": 2}, only_post=True),
    "unauthorized": FaultKind("all", "before"),
    "forbidden": FaultKind("all", "before"),
    "no-credits": FaultKind("post", "before"),
    "unavailable": FaultKind("all", "before", {"seconds": 1}),
    "other-success": FaultKind("post", "after", {"status": 202}),
    "flickering-task": FaultKind("post", "task", {"seconds": 5}, only_post=True),
    "odd-credits": FaultKind("get", "after", {"credits": "NaN"}),
    "invalid-utf8": FaultKind("get", "after"),
    "long-id": FaultKind("get", "after", {"length": 600}),
    "deep-json": FaultKind("get", "after", {"depth": 100_000}),
    "many-steps": FaultKind("get", "after", {"steps": 200_000}),
    "gzip-bomb": FaultKind("get", "after", {"mebibytes": 64}),
    "wrong-date": FaultKind("all", "after", {"seconds": 7_200, "age": 0}),
}

_WITH_STATUS = re.compile(r"(error-before|error-after)-(5\d\d)")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that may go wrong; `scope` and `params` left out are those of the table."""

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
        """Say whether it comes before the request is carried out, after, or later with the task."""
        return FAULT_KINDS[self.name].moment

    def applies_to(self, endpoint: str) -> bool:
        """Say whether a request to this endpoint can have it."""
        return endpoint in ENDPOINTS[self.scope]

    def seconds(self) -> float:
        """Give the param of that name."""
        return float(self.params["seconds"])

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read `[SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]`."""
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
    """Knows what is to go wrong, and what already went."""

    def __init__(self, faults: Iterable[Fault], seed: int) -> None:
        self.applied_counts: Counter[str] = Counter()
        self._seed = seed
        self._random_faults = [(number, fault, Counter[str]()) for number, fault in enumerate(faults)]
        self._injected: deque[Fault] = deque()

    def inject(self, fault: Fault, times: int) -> None:
        """Have the next matching requests meet this fault."""
        self._injected.extend([fault] * times)

    def clear(self) -> None:
        """Let nothing go wrong from now on."""
        self._injected.clear()
        self._random_faults.clear()

    def pending(self) -> list[str]:
        """Name what was chosen and has not happened yet."""
        return [fault.name for fault in self._injected]

    def draw(self, endpoint: str) -> Fault | None:
        """Say what goes wrong with this request; chosen faults go before chances."""
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
        for number, fault, seen in self._random_faults:
            if fault.applies_to(endpoint):
                seen["requests"] += 1
                if self._random_number(number, seen["requests"]) < fault.probability:
                    drawn = drawn or fault
        return drawn

    def _random_number(self, number: int, request: int) -> float:
        digest = blake2b(f"{self._seed} {number} {request}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64
