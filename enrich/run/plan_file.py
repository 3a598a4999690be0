"""A saved plan: what it is based on, and whether that still holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from enrich.databar.waterfall import Provider, Waterfall
from enrich.errors import CommandRefused, EnrichError, JobError
from enrich.job.bounded_read import read_text
from enrich.job.job import Job
from enrich.models import State, iso_time, to_micros
from enrich.rows.reader import JobInput
from enrich.rows.template import RequestTemplate


class ProviderPrice(BaseModel):
    """A provider or the verifier, with its price in millionths of a credit; None: unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    price: int | None


class PlanInputs(BaseModel):
    """What a plan is based on: digests of job, input and `suppress` list; the providers and their prices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    input: str
    suppress: str | None
    waterfall: str
    providers: list[ProviderPrice]
    verifier: ProviderPrice | None


class SavedPlan(BaseModel):
    """What `enrich plan -o FILE` writes and `enrich run --plan FILE` follows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    made_ms: int
    ground: PlanInputs
    limit: int | None
    sample: int | None
    seed: int
    retry: list[State]
    max_credits: float | None
    to_submit: int
    #: The newest run when the plan was made. Requests of later runs count as sent for this plan.
    after_execution: int


def gather_plan_inputs(job: Job, template: RequestTemplate, waterfall: Waterfall, job_input: JobInput) -> PlanInputs:
    """Gather what must not change between the plan and the run."""
    resolved = [job.name, job.model.model_dump_json(), str(job.ledger)]
    providers, verifier = provider_prices(template, waterfall)
    return PlanInputs(
        job=sha256(json.dumps(resolved).encode()).hexdigest(),
        input=job_input.digest(),
        suppress=job_input.suppression_digest(),
        waterfall=template.call.waterfall,
        providers=providers,
        verifier=verifier,
    )


def provider_prices(
    template: RequestTemplate, waterfall: Waterfall
) -> tuple[list[ProviderPrice], ProviderPrice | None]:
    """Return the prices of the providers in the call, and of its verifier."""
    providers = {provider.id: provider for provider in waterfall.available_enrichments}
    verifiers = {verifier.id: verifier for verifier in waterfall.email_verifiers}
    verifier = template.call.email_verifier
    return (
        [_provider_price(number, providers.get(number)) for number in template.call.enrichments],
        None if verifier is None else _provider_price(verifier, verifiers.get(verifier)),
    )


def _provider_price(provider_id: int, provider: Provider | None) -> ProviderPrice:
    return ProviderPrice(id=provider_id, price=None if provider is None else to_micros(provider.price))


def changed_inputs(planned: PlanInputs, current: PlanInputs) -> Sequence[str]:
    """Return the names of the inputs that changed."""
    changed = []
    if planned.job != current.job:
        changed.append("the job file, or the options")
    if planned.input != current.input:
        changed.append("the input")
    if planned.suppress != current.suppress:
        changed.append("the list of `suppress`")
    provider_ids = [
        [provider.id for provider in [*each.providers, *([each.verifier] if each.verifier else [])]]
        for each in (planned, current)
    ]
    if (planned.waterfall, provider_ids[0]) != (current.waterfall, provider_ids[1]):
        changed.append("the providers")
    elif (planned.providers, planned.verifier) != (current.providers, current.verifier):
        changed.append("the prices")
    return changed


def check_plan(plan: SavedPlan, current: PlanInputs) -> None:
    """Raise CommandRefused when something changed since the plan was made."""
    if changed := changed_inputs(plan.ground, current):
        description = " and ".join([", ".join(changed[:-1]), changed[-1]] if changed[1:] else changed)
        raise CommandRefused(
            f"{description} changed since the plan was made ({iso_time(plan.made_ms)})",
            "make a new one: enrich plan -o FILE",
        )


def write_plan(path: Path, plan: SavedPlan) -> None:
    """Write a plan (mode 0600), whole or not at all. Raises JobError when the file exists and is not a plan."""
    if path.exists() and not path.is_file():
        raise CommandRefused(f"{path}: the plan cannot be written: it is no file")
    try:
        if path.exists() and path.stat().st_size:
            read_plan(path)
    except EnrichError as error:
        raise JobError(f"{path}: this is there already, and no plan", "choose another name for the plan") from error
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(plan.model_dump_json(indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise CommandRefused(f"{path}: the plan cannot be written: {error.strerror}") from error


def read_plan(path: Path) -> SavedPlan:
    """Read a plan. Raises CommandRefused when the file cannot be read, JobError when it is not a plan."""
    try:
        return SavedPlan.model_validate_json(read_text(path))
    except OSError as error:
        raise CommandRefused(f"{path}: the plan cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: this is no plan of this version of enrich", "make one: enrich plan -o FILE") from error
