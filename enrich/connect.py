"""Asks the API who we are and what the waterfall is, and holds both against the job and the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity

from enrich.api.client import Client
from enrich.api.waterfall import Waterfall
from enrich.errors import (
    ApiUnreachable,
    CertificateUntrusted,
    JobError,
    JobRejected,
    NotAccepted,
    NotUnderstood,
    OtherWorkspace,
    RateLimited,
    Refused,
    Unauthorized,
)
from enrich.job import SANDBOX_SUFFIX, Job, nearest
from enrich.model import Call, read_balance
from enrich.place import Postgres
from enrich.question import Question, default_providers, make_question
from enrich.store.ledger import Ledger

T = TypeVar("T")
LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Connection:
    """What was learned. `balance` in millionths, None when the API does not say; `notes` are for the person.

    `providers` are those enabled by default when the waterfall was first used.
    """

    question: Question
    balance: int | None
    bound_to: dict[str, str | None]
    waterfall: Waterfall
    providers: list[int]
    notes: list[str]


async def patiently(ask: Callable[[], Awaitable[T]], at_most_s: float) -> T:
    """Ask an unpaid question again until it is answered.

    Raises ApiUnreachable after `at_most_s` seconds, and at once when the certificate is not trusted.
    """

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, RateLimited) and error.retry_after is not None:
            return error.retry_after
        return min(LONGEST_PAUSE_S, 0.25 * 2.0**state.attempt_number)

    try:
        async with asyncio.timeout(at_most_s):
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(_may_mend),
                stop=tenacity.stop_before_delay(at_most_s),
                wait=pause,
                reraise=True,
            ):
                with attempt:
                    return await ask()
    except Unauthorized:
        raise
    except (NotAccepted, TimeoutError) as error:
        reason = str(error) or f"no answer in {at_most_s:g} s"
        what = "" if isinstance(error, NotUnderstood) else "the API is unreachable: "
        hint = getattr(error, "hint", None) or "run the same command again later"
        raise ApiUnreachable(f"{what}{reason}", hint) from error
    raise AssertionError  # the loop returns or raises


def _may_mend(error: BaseException) -> bool:
    return isinstance(error, NotAccepted) and not isinstance(error, Unauthorized | CertificateUntrusted)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a ledger knows that matters here; `used`: an execution was begun from it."""

    bound_to: Mapping[str, str | None]
    waterfall: tuple[dict[str, Any], list[int] | None] | None
    used: bool


def recall(ledger: Ledger, identifier: str) -> Memory:
    """Look up what the ledger is bound to, and a waterfall."""
    bound_to = {name: ledger.fact(name) for name in ("api_host", "workspace")}
    return Memory(bound_to, ledger.waterfall(identifier), bool(ledger.executions(last=1)))


def check_host(memory: Memory, job: Job, host: str) -> None:
    """Raise JobError when the ledger belongs to another API host: nothing of it is sent there."""
    bound = memory.bound_to.get("api_host")
    if bound not in (None, host):
        raise JobError(
            f"{job.ledger}: this ledger belongs to another API host: {bound}, not {host}",
            "use another `ledger:`, or the DATABAR_BASE_URL that it was made with",
        )


async def connect(  # noqa: PLR0913 - all of them are needed once
    client: Client,
    memory: Memory,
    job: Job,
    host: str,
    *,
    at_most_s: float,
    update_providers: bool,
    workspace_renamed: bool = False,
) -> Connection:
    """Learn what the run needs to know before it may spend.

    Raises ApiUnreachable, Unauthorized, and JobError when the job, the API and the ledger do not fit together;
    OtherWorkspace unless the person says that it was renamed.
    """
    check_host(memory, job, host)
    try:
        user = await patiently(client.user, at_most_s)
    except JobRejected as error:
        raise JobError(f"DATABAR_BASE_URL: no Databar API answers there: {error.message}") from error
    bound = memory.bound_to.get("workspace")
    if None not in (bound, user.workspace) and bound != user.workspace and not workspace_renamed:
        raise OtherWorkspace(
            f"{job.ledger}: this ledger belongs to another workspace: {bound}, not {user.workspace}",
            "use another `ledger:`, or the key that it was made with; --workspace-renamed if it has a new name",
        )
    bound_to = {"api_host": host, "workspace": user.workspace}
    waterfall = await _waterfall(client, job, at_most_s)
    providers, notes = _providers(memory, job, waterfall, update_providers=update_providers)
    question = make_question(job, waterfall, providers)
    if not memory.used:
        notes += _beside_others(job)
    return Connection(question, read_balance(user.balance), bound_to, waterfall, providers, notes)


def unconnected(job: Job) -> Connection:
    """Make do without the API's description: enough to collect what earlier runs left there, not to ask anything."""
    model = job.model
    call = Call(model.waterfall, tuple(model.enrichments or ()), model.email_verifier)
    question = Question(call, required=(), emails=(), columns=model.columns or {}, worst_price=None)
    return Connection(question, None, {}, Waterfall(identifier=model.waterfall), [], [])


async def _waterfall(client: Client, job: Job, at_most_s: float) -> Waterfall:
    name = job.model.waterfall
    try:
        return await patiently(lambda: client.waterfall(name), at_most_s)
    except JobRejected as error:
        known = await patiently(client.waterfalls, at_most_s)
        hint = nearest(name, [waterfall.identifier for waterfall in known])
        raise job.error(["waterfall"], f"the API has no waterfall `{name}`", hint) from error


def _providers(
    memory: Memory, job: Job, waterfall: Waterfall, *, update_providers: bool
) -> tuple[list[int], list[str]]:
    """Keep the default providers of the first use: a change of the vendor's is told, not followed."""
    offered = default_providers(waterfall)
    first = memory.waterfall[1] if memory.waterfall is not None else None
    if first is None or update_providers:
        return offered, []
    if first != offered and job.model.enrichments is None:
        note = (
            f"the API's default providers of `{waterfall.identifier}` are now {_listed(offered)}; "
            f"this ledger keeps {_listed(first)}; --update-providers takes the new ones over "
            "(the questions are others then, and paid for again)"
        )
        return first, [note]
    return first, []


def _listed(providers: list[int]) -> str:
    return ", ".join(map(str, providers))


def _beside_others(job: Job) -> list[str]:
    """Announce a new ledger beside others: a renamed job would pay again."""
    if isinstance(job.ledger, Postgres):
        return []
    sandbox = job.ledger.name.endswith(SANDBOX_SUFFIX)
    others = [
        path.name
        for path in job.ledger.parent.glob("*.db")
        if path != job.ledger and path.name.endswith(SANDBOX_SUFFIX) is sandbox and not path.name.endswith(".api.db")
    ]
    if not others:
        return []
    note = (
        f"a new ledger is made, {job.ledger}, beside {', '.join(sorted(others))}: "
        "what those have answered is paid for again, unless `ledger:` in the job file names one of them"
    )
    return [note]


def remembered(ledger: Ledger, job: Job) -> Question:
    """Make the question again without the API, from what the ledger keeps.

    Raises Refused when this waterfall was never asked from this ledger.
    """
    known = ledger.waterfall(job.model.waterfall)
    if known is None:
        raise Refused(f"{job.ledger}: this job has never run: its ledger knows nothing", "enrich run it first")
    description, providers = known
    return make_question(job, Waterfall.model_validate(description), providers or [])
