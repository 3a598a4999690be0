"""A saved plan: what it is based on, and whether that still holds."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from enrich.databar.description import Provider
from enrich.errors import UNWRITABLE_HINT, CommandRefused, EnrichError, JobError
from enrich.files.atomic import replace_file
from enrich.job.job import Job
from enrich.job.local_files import read_text
from enrich.job.locations import sandbox_file_name
from enrich.ledger import queries
from enrich.ledger.database import Database
from enrich.models import State, iso_time, to_micros
from enrich.rows.job_input import JobInput
from enrich.run.preflight import Preflight

_CREATE_HINT = "create one: enrich plan JOB -o FILE"


class ProviderPrice(Struct, frozen=True, forbid_unknown_fields=True):
    """A provider or the verifier, with its price in millionths of a credit; None: unknown."""

    id: int
    price: int | None


class PlannedTarget(Struct, frozen=True, forbid_unknown_fields=True):
    """A target with its providers, its verifier and their prices."""

    target: str
    providers: list[ProviderPrice]
    verifier: ProviderPrice | None

    def provider_ids(self) -> list[int]:
        """Return the providers in the order of their calls, then the verifier."""
        return [each.id for each in [*self.providers, *([self.verifier] if self.verifier else [])]]


class PlanInputs(Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan is based on: digests of job, input and `suppress` list; the target, or that of each step."""

    job: str
    input: str
    suppress: str | None
    targets: list[PlannedTarget]


class SavedPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `enrich plan -o FILE` writes and `enrich run --plan FILE` follows."""

    version: Literal[1] = 1
    made_ms: int
    ground: PlanInputs
    limit: int | None
    sample: int | None
    seed: int
    retry: list[State]
    max_credits: float | None
    #: How many requests a run sends: exactly in the first step, at most in each later one.
    requests: list[int]
    #: The newest run when the plan was made. Requests of later runs count as sent for this plan.
    after_execution: int
    #: The plan of a sandbox run.
    sandbox: bool = False


def gather_plan_inputs(job: Job, preflight: Preflight, job_input: JobInput) -> PlanInputs:
    """Gather what must not change between the plan and the run."""
    resolved = [job.name, job.model.model_dump_json(), str(job.ledger)]
    targets = []
    for step in preflight.steps:
        target, description = step.template.target, step.description
        verifier = description.verifier(target)
        targets.append(
            PlannedTarget(
                target=target.canonical(),
                providers=list(map(_provider_price, description.called_providers(target))),
                verifier=None if verifier is None else _provider_price(verifier),
            )
        )
    return PlanInputs(
        job=sha256(json.dumps(resolved).encode()).hexdigest(),
        input=job_input.full_table.digest(),
        suppress=None if job_input.suppression is None else job_input.suppression.digest,
        targets=targets,
    )


def planned_cost(ledger: Database, job: Job, plan: SavedPlan | None, preflight: Preflight) -> int | None:
    """Return what a run spends at most under a saved plan, in millionths. None: no plan, or a price is unknown."""
    if plan is None:
        return None
    cost = 0
    for step, of_step, requests in zip(job.steps, preflight.steps, plan.requests, strict=False):
        left = max(0, requests - queries.sent_since(ledger, plan.after_execution, job.name, step.step))
        price = of_step.template.worst_price
        if left and price is None:
            return None
        cost += left * (price or 0)
    # Open tasks settle in this run, so their reservations come on top.
    return cost + queries.open_reservations(ledger)


def _provider_price(provider: Provider) -> ProviderPrice:
    return ProviderPrice(id=provider.id, price=to_micros(provider.price))


def check_plan(plan: SavedPlan, current: PlanInputs) -> None:
    """Raise CommandRefused when something changed since the plan was made."""
    planned = plan.ground
    called = [[(each.target, each.provider_ids()) for each in inputs.targets] for inputs in (planned, current)]
    comparisons = {
        "the job file or the options": planned.job != current.job,
        "the input": planned.input != current.input,
        "the list of `suppress`": planned.suppress != current.suppress,
        "the providers": called[0] != called[1],
        "the prices": called[0] == called[1] and planned.targets != current.targets,
    }
    if changed := [name for name, is_changed in comparisons.items() if is_changed]:
        description = " and ".join([", ".join(changed[:-1]), changed[-1]] if changed[1:] else changed)
        raise CommandRefused(
            f"{description} changed since the plan was made ({iso_time(plan.made_ms)})",
            "create a new one: enrich plan JOB -o FILE",
        )


def write_plan(path: Path, plan: SavedPlan) -> Path:
    """Write a plan (mode 0600), whole or not at all, and return its path. The sandbox replaces no plan of a real run.

    Raises JobError when the file exists and is not a plan.
    """
    try:
        if path.exists() and not path.is_file():
            raise CommandRefused(f"{path}: the plan cannot be written: it is not a file", UNWRITABLE_HINT)
        if path.exists() and path.stat().st_size and not _read_earlier(path).sandbox and plan.sandbox:
            return write_plan(path.with_name(sandbox_file_name(path.name)), plan)
        replace_file(path, msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
    except OSError as error:
        raise CommandRefused(f"{path}: the plan cannot be written: {error.strerror}", UNWRITABLE_HINT) from error
    return path


def _read_earlier(path: Path) -> SavedPlan:
    try:
        return read_plan(path)
    except EnrichError as error:
        raise JobError(f"{path}: this file exists and is not a plan", "choose another name for the plan") from error


def read_plan(path: Path) -> SavedPlan:
    """Read a plan. Raises CommandRefused when the file cannot be read, JobError when it is not a plan."""
    try:
        return msgspec.json.decode(read_text(path), type=SavedPlan)
    except OSError as error:
        raise CommandRefused(f"{path}: the plan cannot be read: {error.strerror}", _CREATE_HINT) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: this is not a plan of this version of enrich", _CREATE_HINT) from error
