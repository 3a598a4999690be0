"""Fetches account and waterfall from the API before a run, and checks them against the job and the ledger."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity

from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.credentials import ApiAccess
from enrich.databar.waterfall import User, Waterfall
from enrich.errors import (
    ApiUnreachable,
    CertificateUntrusted,
    CommandRefused,
    JobError,
    JobRejected,
    RateLimited,
    RequestNotAccepted,
    Unauthorized,
    UnexpectedResponse,
    WorkspaceMismatch,
)
from enrich.job.job import SANDBOX_SUFFIX, Job, suggest_name
from enrich.job.locations import PostgresLocation
from enrich.ledger.ledger import Ledger
from enrich.models import Call, read_balance
from enrich.rows.template import RequestTemplate, default_providers, make_request_template
from enrich.run.state import Timeouts

T = TypeVar("T")
MAX_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the API returned. `balance` in millionths; None: the API does not give it. `notes` are for the user.

    `providers` are those that were enabled by default when the waterfall was first used.
    """

    template: RequestTemplate
    balance: int | None
    bound_to: dict[str, str | None]
    waterfall: Waterfall
    providers: list[int]
    notes: list[str]


async def retry_until(call: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """Repeat a free call until it is answered.

    Raises ApiUnreachable after `timeout_s` seconds, and at once when the certificate is not trusted.
    """

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, RateLimited) and error.retry_after is not None:
            return error.retry_after
        return min(MAX_PAUSE_S, 0.25 * 2.0**state.attempt_number)

    try:
        async with asyncio.timeout(timeout_s):
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(_is_retryable),
                stop=tenacity.stop_before_delay(timeout_s),
                wait=pause,
                reraise=True,
            ):
                with attempt:
                    return await call()
    except Unauthorized:
        raise
    except (RequestNotAccepted, TimeoutError) as error:
        reason = str(error) or f"no answer in {timeout_s:g} s"
        what = "" if isinstance(error, UnexpectedResponse) else "the API is unreachable: "
        hint = getattr(error, "hint", None) or "run the same command again later"
        raise ApiUnreachable(f"{what}{reason}", hint) from error
    raise AssertionError  # the loop returns or raises


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, RequestNotAccepted) and not isinstance(error, Unauthorized | CertificateUntrusted)


@dataclass(frozen=True, slots=True)
class LedgerBinding:
    """What the preflight needs from the ledger. `has_runs`: a run was started with this ledger before."""

    bound_to: Mapping[str, str | None]
    waterfall: tuple[dict[str, Any], list[int] | None] | None
    has_runs: bool


def read_binding(ledger: Ledger, identifier: str) -> LedgerBinding:
    """Read what the ledger is bound to, and its copy of a waterfall."""
    bound_to = {name: ledger.read_fact(name) for name in ("api_host", "workspace")}
    return LedgerBinding(bound_to, ledger.waterfall(identifier), bool(ledger.executions(last=1)))


def check_api_host(binding: LedgerBinding, job: Job, host: str) -> None:
    """Raise JobError when the ledger belongs to another API host, so that nothing of it is sent there."""
    bound_host = binding.bound_to.get("api_host")
    if bound_host not in (None, host):
        raise JobError(
            f"{job.ledger}: this ledger belongs to another API host: {bound_host}, not {host}",
            "use another `ledger:`, or the DATABAR_BASE_URL that it was made with",
        )


async def preflight(  # noqa: PLR0913 - every argument is used once
    client: Client,
    binding: LedgerBinding,
    job: Job,
    host: str,
    *,
    timeout_s: float,
    update_providers: bool,
    workspace_renamed: bool = False,
) -> Preflight:
    """Fetch what the run needs before it may spend.

    Raises ApiUnreachable, Unauthorized, and JobError when the job, the API and the ledger do not match. Raises
    WorkspaceMismatch for another workspace unless `workspace_renamed`.
    """
    check_api_host(binding, job, host)
    try:
        user = await retry_until(client.get_user, timeout_s)
    except JobRejected as error:
        raise JobError(f"DATABAR_BASE_URL: no Databar API answers there: {error.message}") from error
    bound_workspace = binding.bound_to.get("workspace")
    if None not in (bound_workspace, user.workspace) and bound_workspace != user.workspace and not workspace_renamed:
        raise WorkspaceMismatch(
            f"{job.ledger}: this ledger belongs to another workspace: {bound_workspace}, not {user.workspace}",
            "use another `ledger:`, or the key that it was made with; --workspace-renamed if it has a new name",
        )
    bound_to = {"api_host": host, "workspace": user.workspace}
    waterfall = await _fetch_waterfall(client, job, timeout_s)
    providers, notes = _choose_providers(binding, job, waterfall, update_providers=update_providers)
    template = make_request_template(job, waterfall, providers)
    if not binding.has_runs:
        notes += _note_other_ledgers(job)
    return Preflight(template, read_balance(user.balance), bound_to, waterfall, providers, notes)


def offline_preflight(job: Job) -> Preflight:
    """Build a preflight without the API: enough to collect the open tasks of earlier runs, but not to send requests."""
    model = job.model
    call = Call(model.waterfall, tuple(model.enrichments or ()), model.email_verifier)
    template = RequestTemplate(call, required_params=(), email_params=(), columns=model.columns or {}, worst_price=None)
    return Preflight(template, None, {}, Waterfall(identifier=model.waterfall), [], [])


async def _fetch_waterfall(client: Client, job: Job, timeout_s: float) -> Waterfall:
    name = job.model.waterfall
    try:
        return await retry_until(lambda: client.get_waterfall(name), timeout_s)
    except JobRejected as error:
        known = await retry_until(client.list_waterfalls, timeout_s)
        hint = suggest_name(name, [waterfall.identifier for waterfall in known])
        raise job.error(["waterfall"], f"the API has no waterfall `{name}`", hint) from error


def _choose_providers(
    binding: LedgerBinding, job: Job, waterfall: Waterfall, *, update_providers: bool
) -> tuple[list[int], list[str]]:
    """Keep the default providers of the first use. A change by the vendor is noted, not followed."""
    offered = default_providers(waterfall)
    first = binding.waterfall[1] if binding.waterfall is not None else None
    if first is None or update_providers:
        return offered, []
    if first != offered and job.model.enrichments is None:
        note = (
            f"the API's default providers of `{waterfall.identifier}` are now {_join_ids(offered)}; "
            f"this ledger keeps {_join_ids(first)}; --update-providers takes the new ones over "
            "(the questions are others then, and paid for again)"
        )
        return first, [note]
    return first, []


def _join_ids(providers: list[int]) -> str:
    return ", ".join(map(str, providers))


def _note_other_ledgers(job: Job) -> list[str]:
    """Return a note when a new ledger is created beside others: a renamed job would pay again."""
    if isinstance(job.ledger, PostgresLocation):
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


def template_from_ledger(ledger: Ledger, job: Job) -> RequestTemplate:
    """Build the request template from the ledger, without the API.

    Raises CommandRefused when this waterfall was never used with this ledger.
    """
    known = ledger.waterfall(job.model.waterfall)
    if known is None:
        raise CommandRefused(f"{job.ledger}: this job has never run: its ledger knows nothing", "enrich run it first")
    description, providers = known
    return make_request_template(job, Waterfall.model_validate(description), providers or [])


@dataclass(slots=True)
class _ClockOffsetProbe(SystemClock):
    """Records by how many ms the API's clock is ahead, however little."""

    api_ahead_ms: int | None = None

    def observe(self, api_ms: int) -> None:
        """Compare the clocks."""
        self.api_ahead_ms = api_ms - time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class ApiSnapshot:
    """What the API returns now. `clock_ahead_s`: its clock minus ours, in seconds; None: it sends no time."""

    user: User
    waterfall: Waterfall
    clock_ahead_s: float | None


def query_api(access: ApiAccess, identifier: str, environ: Mapping[str, str] = os.environ) -> ApiSnapshot:
    """Fetch the account and a waterfall; this is free. Raises JobError, ApiUnreachable, Unauthorized."""
    return asyncio.run(_query_api(access, identifier, environ))


async def _query_api(access: ApiAccess, identifier: str, environ: Mapping[str, str]) -> ApiSnapshot:
    clock = _ClockOffsetProbe()
    timeout_s = Timeouts().startup_s
    async with Client(access, clock, environ=environ) as client:
        try:
            user = await retry_until(client.get_user, timeout_s)
        except JobRejected as error:
            raise JobError(f"DATABAR_BASE_URL: no Databar API answers there: {error.message}") from error
        try:
            waterfall = await retry_until(lambda: client.get_waterfall(identifier), timeout_s)
        except JobRejected as error:
            raise JobError(f"waterfall: the API has no waterfall `{identifier}`", "enrich waterfalls") from error
    return ApiSnapshot(user, waterfall, None if clock.api_ahead_ms is None else clock.api_ahead_ms / 1000)
