"""The settings of the sandbox, each also an option of `enrich sandbox` with its help text from here; and the faults.

Faults are set as `[SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]`; `POST /__faults` injects them into the next N requests.
"Before": the request is not carried out (but `slow` delays it). "After": the request is carried out, a run is accepted
and charged, and only the response is broken (a response other than 200 stays as it is, because nothing was carried
out). "Task": the fault belongs to the accepted task, and has at most one param, a number.

`FAULT_KINDS` has the default scope. Any other may be given, except for no-task-id and the faults of moment "task":
they apply to `post` only. `post` is run and bulk-run, `get` the GET of a task, `me` the user, `waterfalls` and
`enrichments` the list or one of them, `all` everything under `/v1`. A silence ends early when the client disconnects.
A flickering task is known at the first poll if it still runs; from the next poll on, or from the first one if it has
finished, it is 404. A slow request is carried out after its delay, even when the client has disconnected by then. Each
fault has its own series of random numbers (from `fault_seed` and the number of the matching request).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from statistics import NormalDist
from typing import Annotated, Literal, get_args

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
        for name, value in params.items():
            if not isinstance(kind.params[name], str) and (isinstance(value, str) or not math.isfinite(value)):
                raise ValueError(f"the param {name} of fault {self.name!r} must be a number")
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
        chance = _parse_param(probability)
        if not equals or isinstance(chance, str) or any(not sign for _, sign, _ in pairs):
            raise ValueError(f"fault {text!r} is not of the form [SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]")
        return cls(name, chance, scope, {key: _parse_param(value) for key, _, value in pairs})


def _parse_param(text: str) -> Param:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


MissKind = Literal["null", "empty_list", "empty_object", "null_result", "blank_result", "no_data"]
Shape = Literal["wrapped", "wrapper_object", "flat", "flat_list"]
ErrorShape = Literal["new", "fields", "old", "old_short"]

MISS_KINDS: tuple[MissKind, ...] = get_args(MissKind)

# A plausible median (seconds) and sigma for an asynchronous API with several providers.
_DEFAULT_LATENCY = "lognormal(1.2,0.6)"

# Maps a random number (above 0, below 1) to seconds.
Latency = Callable[[float], float]

_FORM = re.compile(r"\s*(lognormal|uniform|fixed)\s*\(([^()]*)\)\s*")
_NORMAL = NormalDist()


def parse_latency(text: str) -> Latency:
    """Parse `lognormal(median,sigma)`, `uniform(low,high)` or `fixed(seconds)`. Raises ValueError."""
    match = _FORM.fullmatch(text)
    try:
        name, values = (match[1], [float(value) for value in match[2].split(",")]) if match else ("", [])
    except ValueError:
        name, values = "", []
    match name, values:
        case "lognormal", [median, sigma] if median > 0 and sigma >= 0:
            return lambda draw: median * math.exp(sigma * _NORMAL.inv_cdf(draw))
        case "uniform", [low, high] if 0 <= low <= high:
            return lambda draw: low + (high - low) * draw
        case "fixed", [seconds] if seconds >= 0:
            return lambda _: seconds
    raise ValueError(f"latency {text!r} is none of lognormal(median,sigma), uniform(low,high), fixed(seconds)")


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """How the sandbox behaves. The defaults: an API without faults, as its newest documentation describes it."""

    api_key: Annotated[str, "The API key that is accepted."] = "sandbox-key"
    wrong_key: Annotated[Literal["403", "401"], "Status for any other key."] = "403"
    balance: Annotated[float, "Balance of a new sandbox, in credits."] = 10_000
    seed: Annotated[int, "Seed of the invented people. The same seed gives the same results."] = 1
    hit_rate: Annotated[float, "Share of the requests with a match."] = 0.7
    failure_rate: Annotated[float, "Share of the requests whose task fails."] = 0.015
    free_failures: Annotated[float, "Share of the failures that are free and succeed when sent again."] = 0.5
    miss_kinds: Annotated[tuple[MissKind, ...], "Form of a result without a match. Can be repeated."] = MISS_KINDS
    no_data_seconds: Annotated[float | None, "Seconds of `no_data` before `completed`. none: forever."] = 2.0
    latency: Annotated[str, "Task duration in seconds: lognormal(median,sigma), uniform(a,b) or fixed(s)."] = (
        _DEFAULT_LATENCY
    )
    result_ttl: Annotated[float, "Seconds until a result expires."] = 86_400.0
    expired_as: Annotated[Literal["410", "gone"], "Response for an expired task: 410, or 200 with status gone."] = "410"
    shape: Annotated[Shape, "Form of the data of a result."] = "wrapped"
    error_shape: Annotated[ErrorShape, "Form of a 400. `old_short` lists only the wrong rows of a bulk request."] = (
        "new"
    )
    bulk_data: Annotated[Literal["aligned", "hits"], "Data of a bulk task: one entry per row, or matches only."] = (
        "aligned"
    )
    bulk_limit: Annotated[int | None, "Maximum rows of a bulk task. none: no limit."] = None
    aliases: Annotated[bool, "Return `success` and `error` instead of `completed` and `failed`."] = False
    hide_credits: Annotated[bool, "Omit `credits_spent`."] = False
    prices: Annotated[
        Literal["sample", "real"], "Small prices, or prices like those of the real API: 3 to 35 credits."
    ] = "sample"
    charge_misses: Annotated[bool, "Charge for each provider without a match, too."] = False
    require_enrichments: Annotated[bool, "Return 422 for a request without `enrichments`."] = False
    date_offset: Annotated[float, "Seconds by which the Date header is ahead of the clock."] = 0.0
    rate: Annotated[float | None, "Requests per second that are allowed. none: no limit."] = None
    burst: Annotated[int, "Requests allowed at once, above the rate."] = 10
    retry_after: Annotated[int | None, "Retry-After of a 429, in seconds. none: no header."] = 1
    fault_seed: Annotated[int, "Seed that chooses the requests with faults."] = 1
    faults: Annotated[
        tuple[Fault, ...],
        f"[SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]. SCOPE is one of {', '.join(ENDPOINTS)}. Can be repeated.",
    ] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{each.name} must be a finite number")
        for name in ("hit_rate", "failure_rate", "free_failures"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1")
        if not self.miss_kinds or set(self.miss_kinds) - set(MISS_KINDS):
            raise ValueError(f"miss_kinds must be some of {', '.join(MISS_KINDS)}")
        if self.rate is not None and self.rate <= 0:
            raise ValueError("rate must be above 0, or none")
        parse_latency(self.latency)


DEFAULTS = SandboxSettings()
