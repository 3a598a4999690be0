"""The settings of the sandbox; each is also an option of `enrich sandbox`, with its help text from here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from enrich.sandbox.faults import Fault
from enrich.sandbox.latency import parse_latency

MissKind = Literal["null", "empty_list", "empty_object", "null_result", "blank_result", "no_data"]
Shape = Literal["wrapped", "wrapper_object", "flat", "flat_list"]
ErrorShape = Literal["new", "fields", "old", "old_short"]

MISS_KINDS: tuple[MissKind, ...] = ("null", "empty_list", "empty_object", "null_result", "blank_result", "no_data")

# A plausible median (seconds) and sigma for an asynchronous API with several providers.
_DEFAULT_LATENCY = "lognormal(1.2,0.6)"


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """How the sandbox behaves. The defaults: an API without faults, as its newest documentation describes it."""

    api_key: Annotated[str, "The key it accepts."] = "sandbox-key"
    wrong_key: Annotated[Literal["403", "401"], "Status for another key."] = "403"
    balance: Annotated[float, "Credits to begin with, when the state is new."] = 10_000
    seed: Annotated[int, "Which people it knows: same seed, same answers."] = 1
    hit_rate: Annotated[float, "Share of the questions that have an answer."] = 0.7
    failure_rate: Annotated[float, "Share of the questions whose task fails."] = 0.015
    free_failures: Annotated[float, "Share of the failures that cost nothing and succeed when asked again."] = 0.5
    miss_kinds: Annotated[tuple[MissKind, ...], "How a miss looks; repeat for several."] = MISS_KINDS
    no_data_seconds: Annotated[float | None, "How long `no_data` lasts before `completed`; none: for ever."] = 2.0
    latency: Annotated[str, "How long a task takes: lognormal(median,sigma), uniform(a,b) or fixed(s)."] = (
        _DEFAULT_LATENCY
    )
    result_ttl: Annotated[float, "Seconds a result is kept after completion."] = 86_400.0
    expired_as: Annotated[Literal["410", "gone"], "Answer for an expired task: 410, or 200 with status gone."] = "410"
    shape: Annotated[Shape, "Shape of a result's data."] = "wrapped"
    error_shape: Annotated[ErrorShape, "Shape of a 400; `old_short` lists in bulk the wrong rows alone."] = "new"
    bulk_data: Annotated[Literal["aligned", "hits"], "A bulk task's data: along its rows, or the hits alone."] = (
        "aligned"
    )
    bulk_limit: Annotated[int | None, "Rows that a bulk-run may have; none: any number."] = None
    aliases: Annotated[bool, "Say `success` and `error` for `completed` and `failed`."] = False
    hide_credits: Annotated[bool, "Leave `credits_spent` out."] = False
    charge_misses: Annotated[bool, "Charge for each provider that found nothing, too."] = False
    require_enrichments: Annotated[bool, "Answer 422 to a run without `enrichments`."] = False
    date_offset: Annotated[float, "Seconds by which the Date header is ahead of the sandbox's clock."] = 0.0
    rate: Annotated[float | None, "Requests a second that are allowed; none: any."] = None
    burst: Annotated[int, "Requests allowed at once, beyond the rate."] = 10
    retry_after: Annotated[int | None, "Seconds to send as Retry-After when over the rate; none: no header."] = 1
    fault_seed: Annotated[int, "Which requests meet the faults."] = 1
    faults: Annotated[tuple[Fault, ...], "[SCOPE:]NAME=PROBABILITY[,PARAM=VALUE…]; repeat for several."] = ()

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
