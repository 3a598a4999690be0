"""Fetches account and target from the API before a run, and checks them against the job and the ledger."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from msgspec import Struct
from msgspec.structs import replace
from pydantic import ValidationError

from enrich.databar.clock import Clock, SystemClock
from enrich.databar.description import Description, Enrichment, User, Waterfall, parse_description
from enrich.databar.environment import DEFAULT_BASE_URL, ApiAccess
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
    suggest_name,
)
from enrich.job.job import Job
from enrich.job.target import Target, TargetKind
from enrich.ledger import queries, records
from enrich.ledger.database import Database
from enrich.ledger.sqlite_errors import damaged_ledger_error
from enrich.models import read_balance
from enrich.rows.job_input import JobInput
from enrich.rows.job_steps import Step, make_steps
from enrich.rows.template import (
    BESIDE_RESULT,
    RequestTemplate,
    column_fields,
    default_providers,
    join_problems,
    join_templates,
    make_request_template,
    name_problems,
    template_of_unknown_target,
)

if TYPE_CHECKING:
    from enrich.databar.client import Client

T = TypeVar("T")
#: How long to wait before a free call is repeated, in seconds. Doubled each time.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 5.0


class Preflight(Struct, frozen=True):
    """What the API returned. `balance` in millionths; None: the API does not give it. `notes` are for the user.

    `providers` are those that were enabled by default when the waterfall was first used.
    """

    template: RequestTemplate
    balance: int | None
    bound_to: dict[str, str | None]
    description: Description
    providers: list[int]
    notes: list[str]
    #: Those of the steps; () for a job without steps.
    step_preflights: tuple[Preflight, ...] = ()

    @property
    def steps(self) -> tuple[Preflight, ...]:
        """What the API returned for each step. A job without steps is one step."""
        return self.step_preflights or (self,)

    @classmethod
    def of_steps(cls, steps: Sequence[Preflight]) -> Preflight:
        """Join what the API returned for the steps of a job. The template has the columns of all of them."""
        template = join_templates([step.template for step in steps])
        notes = list(dict.fromkeys(note for step in steps for note in step.notes))
        return replace(steps[0], template=template, notes=notes, step_preflights=tuple(steps))


async def retry_until(
    call: Callable[[], Awaitable[T]],
    timeout_s: float,
    *,
    final_errors: tuple[type[RequestNotAccepted], ...] = (Unauthorized,),
) -> T:
    """Repeat a free call until it is answered, or raises one of `final_errors`.

    Raises ApiUnreachable after `timeout_s` seconds, and at once when the certificate is not trusted.
    """
    loop, pause_s = asyncio.get_running_loop(), FIRST_PAUSE_S
    deadline = loop.time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline):
            while True:
                try:
                    return await call()
                except RequestNotAccepted as error:
                    wait_s = error.retry_after if isinstance(error, RateLimited) else None
                    wait_s = pause_s if wait_s is None else wait_s
                    is_final = isinstance(error, (*final_errors, CertificateUntrusted))
                    if is_final or loop.time() + wait_s >= deadline:
                        raise
                    await asyncio.sleep(wait_s)
                    pause_s = min(MAX_PAUSE_S, 2 * pause_s)
    except final_errors:
        raise
    except (RequestNotAccepted, TimeoutError) as error:
        reason = str(error) or f"no response in {timeout_s:g} s"
        what = "" if isinstance(error, UnexpectedResponse) else "the API is unreachable: "
        hint = getattr(error, "hint", None) or "run the same command again later"
        raise ApiUnreachable(f"{what}{reason}", hint) from error


class LedgerBinding(Struct, frozen=True):
    """What the ledger has about a job, or a step of it.

    `description` and its default `providers` are as the API last gave them, None without that. `answered` has the
    fields of the job's columns that answers have although the description does not name them.
    """

    job: Job
    bound_to: Mapping[str, str | None] = {}
    description: Description | None = None
    providers: list[int] | None = None
    answered: frozenset[str] = frozenset()


def read_binding(ledger: Database, job: Job) -> LedgerBinding:
    """Read what the ledger is bound to, and its data about the job's target."""
    bound_to = {name: records.read_fact(ledger, name) for name in ("api_host", "workspace")}
    target = job.model.target
    description, providers = _load_description(ledger, target)
    listed = [] if description is None else [field.name for field in description.output_fields]
    fields = column_fields(job).difference(listed, BESIDE_RESULT)
    answered = frozenset(name for name in fields if queries.is_answered_field(ledger, name))
    return LedgerBinding(job, bound_to, description, providers, answered)


def check_api_host(binding: LedgerBinding, host: str) -> None:
    """Raise JobError when the ledger belongs to another API host, so that nothing of it is sent there."""
    bound_host = binding.bound_to.get("api_host")
    if bound_host not in (None, host):
        raise JobError(
            f"{binding.job.ledger}: this ledger belongs to another API host: {bound_host}, not {host}",
            "set another `ledger:`, or use the DATABAR_BASE_URL of this one",
        )


def check_workspace(binding: LedgerBinding, user: User) -> None:
    """Raise WorkspaceMismatch when the key belongs to another workspace than the ledger."""
    bound_workspace = binding.bound_to.get("workspace")
    if None not in (bound_workspace, user.workspace) and bound_workspace != user.workspace:
        raise WorkspaceMismatch(
            f"{binding.job.ledger}: this ledger belongs to another workspace: {bound_workspace}, not {user.workspace}",
            "set another `ledger:`, or use the key of this one; if the workspace was renamed: --workspace-renamed",
        )


async def preflight(  # noqa: PLR0913 - every argument is used once
    client: Client,
    bindings: Sequence[LedgerBinding],
    host: str,
    timeout_s: float,
    *,
    update_providers: bool,
    workspace_renamed: bool = False,
) -> Preflight:
    """Fetch what the run needs before it may spend. `bindings` are those of the job's steps.

    Raises ApiUnreachable after `timeout_s` seconds, Unauthorized, and JobError when the job, the API and the ledger do
    not match. Raises WorkspaceMismatch for another workspace unless `workspace_renamed`.
    """
    check_api_host(bindings[0], host)
    user = await _fetch_user(client, timeout_s)
    if not workspace_renamed:
        check_workspace(bindings[0], user)
    balance, bound_to = read_balance(user.balance), {"api_host": host, "workspace": user.workspace}
    steps = []
    for binding in bindings:
        step, description = binding.job, await _fetch_description(client, binding.job, timeout_s)
        providers, notes = _choose_providers(binding, description, update_providers=update_providers)
        if problems := name_problems(step, description, binding.description, binding.answered):
            raise join_problems(problems)
        template = make_request_template(step, description, providers)
        steps.append(Preflight(template, balance, bound_to, description, providers, notes))
    return Preflight.of_steps(steps)


def offline_preflight(job: Job) -> Preflight:
    """Build a preflight without the API: enough to collect the open tasks of earlier runs, but not to send requests."""
    if job.step_jobs:
        return Preflight.of_steps([offline_preflight(step) for step in job.step_jobs])
    target = job.model.target
    is_waterfall = target.kind is TargetKind.WATERFALL
    description = Waterfall(identifier=target.id) if is_waterfall else Enrichment(id=int(target.id))
    return Preflight(template_of_unknown_target(job), None, {}, description, [], [])


async def _fetch_user(client: Client, timeout_s: float) -> User:
    try:
        return await retry_until(client.get_user, timeout_s)
    except JobRejected as error:
        message = f"DATABAR_BASE_URL: no Databar API at this address: {error.message}"
        raise JobError(message, f"remove it to use {DEFAULT_BASE_URL}") from error


async def _fetch_description(client: Client, job: Job, timeout_s: float) -> Description:
    target = job.model.target
    try:
        return await retry_until(lambda: client.get_description(target), timeout_s)
    except JobRejected as error:
        known = await retry_until(lambda: client.list_descriptions(target.kind), timeout_s)
        hint = suggest_name(target.id, [each.identifier for each in known]) or f"`enrich {target.kind}s` lists them"
        raise job.error([target.kind.value], f"the API has no {target.kind} `{target.id}`", hint) from error


def _choose_providers(
    binding: LedgerBinding, description: Description, *, update_providers: bool
) -> tuple[list[int], list[str]]:
    """Keep the default providers of the first use. A change by the vendor is noted, not followed."""
    offered = default_providers(description)
    first = binding.providers
    if first is None or update_providers:
        return offered, []
    if first != offered and binding.job.model.enrichments is None:
        listed = {provider.id for provider in description.available_enrichments}
        gone = [number for number in first if number not in listed]
        missing = f", but the API no longer lists {_join_ids(gone)}" if gone else ""
        note = (
            f"the default providers of `{description.identifier}` are now {_join_ids(offered) or 'none'}; "
            f"this ledger keeps {_join_ids(first)}{missing}; "
            "--update-providers switches to the new ones "
            "(this sends and charges the requests again)"
        )
        return first, [note]
    return first, []


def _join_ids(providers: list[int]) -> str:
    return ", ".join(map(str, providers))


def template_from_ledger(ledger: Database, job: Job) -> RequestTemplate:
    """Build the request template from the ledger, without the API. That of a job with steps has all their columns.

    Raises CommandRefused when this target, or that of every step, was never used with this ledger.
    """
    template, is_known = find_template(ledger, job)
    if not is_known:
        what = "a step of this job" if job.step_jobs else job.model.target.label
        raise CommandRefused(f"{job.ledger}: no run of this ledger has used {what}", "run it first: enrich run JOB")
    return template


def find_template(ledger: Database, job: Job) -> tuple[RequestTemplate, bool]:
    """Return the request template of a job or a step, and whether the ledger has its target, or that of any step.

    Without a description, the required params are those of the documentation, if it has the target.
    """
    if job.step_jobs:
        templates, known = zip(*(find_template(ledger, step) for step in job.step_jobs), strict=True)
        return join_templates(templates), any(known)
    description, providers = _load_description(ledger, job.model.target)
    if description is None:
        return template_of_unknown_target(job), False
    return make_request_template(job, description, providers or []), True


def steps_from_ledger(ledger: Database, job: Job, job_input: JobInput) -> tuple[Step, ...]:
    """Make the steps of a job from the ledger, without the API.

    Raises JobError for a column that no step has, CommandRefused if a step that has never run may have it.
    """
    templates = [find_template(ledger, step)[0] for step in job.step_jobs]
    try:
        return make_steps(job, job_input, templates)
    except JobError:
        for step, template in zip(job.step_jobs, templates, strict=True):
            if not template.columns:
                message = f"{job.ledger}: the step `{step.step}` has never run, and its fields are not known"
                raise CommandRefused(message, "run it first: enrich run JOB") from None
        raise


def _load_description(ledger: Database, target: Target) -> tuple[Description | None, list[int] | None]:
    """Load a description and its default providers from the ledger. Raises LedgerDamaged if it is not one."""
    if (stored := records.load_description(ledger, target)) is None:
        return None, None
    try:
        return parse_description(target.kind, stored[0]), stored[1]
    except ValidationError as error:
        reason = f"the description of {target.label} cannot be read"
        raise damaged_ledger_error(ledger.location, reason) from error


class ApiSnapshot(Struct, frozen=True):
    """What the API returns now, with a description for each step of the job.

    `clock_ahead_s`: its clock minus ours, in seconds; None: it sends no time.
    """

    user: User
    descriptions: tuple[Description, ...]
    clock_ahead_s: float | None


def query_api(access: ApiAccess, job: Job, environ: Mapping[str, str] = os.environ) -> ApiSnapshot:
    """Fetch the account and the job's target; this is free. Raises JobError, ApiUnreachable, Unauthorized."""
    clock = SystemClock()

    async def fetch(client: Client, timeout_s: float) -> tuple[User, tuple[Description, ...]]:
        user = await _fetch_user(client, timeout_s)
        return user, tuple([await _fetch_description(client, step, timeout_s) for step in job.steps])

    user, descriptions = with_client(access, fetch, clock, environ)
    return ApiSnapshot(user, descriptions, None if clock.api_ahead_ms is None else clock.api_ahead_ms / 1000)


def call_api(access: ApiAccess, call: Callable[[Client], Awaitable[T]]) -> T:
    """Make a free call, and repeat it until it is answered; see `retry_until`."""
    return with_client(access, lambda client, timeout_s: retry_until(lambda: call(client), timeout_s))


def with_client(
    access: ApiAccess,
    work: Callable[[Client, float], Awaitable[T]],
    clock: Clock | None = None,
    environ: Mapping[str, str] = os.environ,
) -> T:
    """Do work with a client, in an event loop of its own. `work` gets the time-out of free calls in seconds, too."""
    # `check` imports this file, and uses the API on request only.
    from enrich.databar.client import Client  # noqa: PLC0415
    from enrich.run.run_state import Timeouts  # noqa: PLC0415

    async def main() -> T:
        async with Client(access, clock or SystemClock(), environ=environ) as client:
            return await work(client, Timeouts().startup_s)

    return asyncio.run(main())
