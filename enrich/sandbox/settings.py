"""The settings of the sandbox; each is also an option of `enrich sandbox`, with its help text from here."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal, get_args

from enrich.sandbox.faults import ENDPOINTS, Fault

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
        for name in ("hit_rate", "failure_rate", "free_failures"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1")
        if not self.miss_kinds or set(self.miss_kinds) - set(MISS_KINDS):
            raise ValueError(f"miss_kinds must be some of {', '.join(MISS_KINDS)}")
        if self.rate is not None and self.rate <= 0:
            raise ValueError("rate must be above 0, or none")
        parse_latency(self.latency)


DEFAULTS = SandboxSettings()
