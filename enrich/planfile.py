"""A frozen plan: what it stood on, and whether that still holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from enrich.api.waterfall import Provider, Waterfall
from enrich.bounded_read import read_text
from enrich.errors import EnrichError, JobError, Refused
from enrich.job import Job
from enrich.model import State, iso, to_micros
from enrich.question import Question
from enrich.rows import Rows


class Priced(BaseModel):
    """A provider or the verifier, with its price in millionths of a credit; None: not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    price: int | None


class Ground(BaseModel):
    """What a plan stands on: digests of the job, the input and the list of `suppress`; who is asked at what price."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    input: str
    suppress: str | None
    waterfall: str
    providers: list[Priced]
    verifier: Priced | None


class FrozenPlan(BaseModel):
    """What `enrich plan -o FILE` writes and `enrich run --plan FILE` keeps to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    made_ms: int
    ground: Ground
    limit: int | None
    sample: int | None
    seed: int
    retry: list[State]
    max_credits: float | None
    to_submit: int
    #: The newest execution when it was made: what later ones asked was asked for it.
    after_execution: int


def ground(job: Job, question: Question, waterfall: Waterfall, rows: Rows) -> Ground:
    """Gather what must not change between the plan and the run."""
    resolved = [job.name, job.model.model_dump_json(), str(job.ledger)]
    providers, verifier = asked(question, waterfall)
    return Ground(
        job=sha256(json.dumps(resolved).encode()).hexdigest(),
        input=rows.digest(),
        suppress=rows.suppressed_digest(),
        waterfall=question.call.waterfall,
        providers=providers,
        verifier=verifier,
    )


def asked(question: Question, waterfall: Waterfall) -> tuple[list[Priced], Priced | None]:
    """Price the providers that are asked, and the verifier."""
    prices = {provider.id: provider for provider in waterfall.available_enrichments}
    verifiers = {verifier.id: verifier for verifier in waterfall.email_verifiers}
    verifier = question.call.email_verifier
    return (
        [_priced(number, prices.get(number)) for number in question.call.enrichments],
        None if verifier is None else _priced(verifier, verifiers.get(verifier)),
    )


def _priced(number: int, provider: Provider | None) -> Priced:
    return Priced(id=number, price=None if provider is None else to_micros(provider.price))


def changes(then: Ground, now: Ground) -> Sequence[str]:
    """Name what is no longer as it was."""
    changed = []
    if then.job != now.job:
        changed.append("the job file, or the options")
    if then.input != now.input:
        changed.append("the input")
    if then.suppress != now.suppress:
        changed.append("the list of `suppress`")
    asked = [
        [provider.id for provider in [*each.providers, *([each.verifier] if each.verifier else [])]]
        for each in (then, now)
    ]
    if (then.waterfall, asked[0]) != (now.waterfall, asked[1]):
        changed.append("the providers")
    elif (then.providers, then.verifier) != (now.providers, now.verifier):
        changed.append("the prices")
    return changed


def check(plan: FrozenPlan, now: Ground) -> None:
    """Raise Refused when something changed since the plan was made."""
    if changed := changes(plan.ground, now):
        what = " and ".join([", ".join(changed[:-1]), changed[-1]] if changed[1:] else changed)
        raise Refused(
            f"{what} changed since the plan was made ({iso(plan.made_ms)})", "make a new one: enrich plan -o FILE"
        )


def write_plan(path: Path, plan: FrozenPlan) -> None:
    """Write a plan (0600), whole or not at all. Raises JobError when that would replace what is no plan."""
    if path.exists() and not path.is_file():
        raise Refused(f"{path}: the plan cannot be written: it is no file")
    try:
        if path.exists() and path.stat().st_size:
            read_plan(path)
    except EnrichError as error:
        raise JobError(f"{path}: this is there already, and no plan", "choose another name for the plan") from error
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(plan.model_dump_json(indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise Refused(f"{path}: the plan cannot be written: {error.strerror}") from error


def read_plan(path: Path) -> FrozenPlan:
    """Read a plan. Raises Refused when it is not there, JobError when it is none."""
    try:
        return FrozenPlan.model_validate_json(read_text(path))
    except OSError as error:
        raise Refused(f"{path}: the plan cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: this is no plan of this version of enrich", "make one: enrich plan -o FILE") from error
