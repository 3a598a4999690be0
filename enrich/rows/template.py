"""Turns a job and a waterfall into a request template: the call, its highest price, its params, its columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from enrich.databar.waterfall import Provider, Waterfall
from enrich.errors import JobError
from enrich.job.job import Job, suggest_name
from enrich.models import Call, to_micros


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """What all requests of a job have in common.

    `required_params` and `email_params` are names of params. `columns` maps new columns to dotted paths. `worst_price`
    is in millionths of a credit; None: the API gives no price.
    """

    call: Call
    required_params: tuple[str, ...]
    email_params: tuple[str, ...]
    columns: Mapping[str, str]
    worst_price: int | None


def default_providers(waterfall: Waterfall) -> list[int]:
    """Return the providers that the API enables by default, in its order."""
    return [provider.id for provider in waterfall.available_enrichments if provider.enabled_by_default]


def make_request_template(job: Job, waterfall: Waterfall, providers: Iterable[int]) -> RequestTemplate:
    """Check the job against the waterfall. `providers` are used when the job names none.

    Raises JobError with the key and the nearest valid name.
    """
    model = job.model
    for problem in (*unknown_params(job, waterfall), *missing_params(job, waterfall)):
        raise problem
    required_params = tuple(param.name for param in waterfall.input_params if param.required)
    chosen = _chosen_providers(job, waterfall, providers)
    verifier = _chosen_verifier(job, waterfall)
    columns = model.columns or {field.name: field.name for field in waterfall.output_fields}
    if not columns:
        raise job.error(["waterfall"], "the API names no output fields for it", "say which `columns` you want")
    return RequestTemplate(
        call=Call(waterfall.identifier, tuple(provider.id for provider in chosen), model.email_verifier),
        required_params=required_params,
        email_params=tuple(p.name for p in waterfall.input_params if p.type == "email" or p.name == "email"),
        columns=columns,
        worst_price=_worst_price(chosen, verifier),
    )


def unknown_params(job: Job, waterfall: Waterfall) -> Iterator[JobError]:
    """Yield an error for each param that the waterfall does not have."""
    known = [param.name for param in waterfall.input_params]
    for name in job.model.params if known else ():
        if name not in known:
            message = f"the waterfall `{waterfall.identifier}` has no such param"
            yield job.error(["params", name], message, suggest_name(name, known))


def missing_params(job: Job, waterfall: Waterfall) -> Iterator[JobError]:
    """Yield an error for each required param that the job does not map."""
    for param in waterfall.input_params:
        if param.required and param.name not in job.model.params:
            message = f"the waterfall `{waterfall.identifier}` requires `{param.name}`"
            yield job.error(["params"], message, f"map it: {param.name}: <a column of the input>")


def _chosen_providers(job: Job, waterfall: Waterfall, providers: Iterable[int]) -> list[Provider]:
    available = {provider.id: provider for provider in waterfall.available_enrichments}
    named = job.model.enrichments
    for index, provider_id in enumerate(named or ()):
        if available and provider_id not in available:
            known = ", ".join(f"{provider.id} {provider.name}" for provider in available.values())
            raise job.error(
                ["enrichments", index], f"`{waterfall.identifier}` has no provider {provider_id}", f"it has {known}"
            )
        if provider_id in (named or ())[:index]:
            raise job.error(["enrichments", index], f"provider {provider_id} is there twice", "remove one of the two")
    chosen = list(named or providers)
    if not chosen:
        raise job.error(["waterfall"], "the API enables none of its providers by default", "say which `enrichments`")
    return [available.get(number, Provider(id=number)) for number in chosen]


def _chosen_verifier(job: Job, waterfall: Waterfall) -> Provider | None:
    verifier_id = job.model.email_verifier
    if verifier_id is None:
        return None
    if not waterfall.is_email_verifying:
        raise job.error(
            ["email_verifier"], f"the waterfall `{waterfall.identifier}` verifies no e-mails", "leave it out"
        )
    verifiers = {verifier.id: verifier for verifier in waterfall.email_verifiers}
    if verifiers and verifier_id not in verifiers:
        known = ", ".join(f"{verifier.id} {verifier.name}" for verifier in verifiers.values())
        raise job.error(
            ["email_verifier"], f"`{waterfall.identifier}` has no verifier {verifier_id}", f"it has {known}"
        )
    return verifiers.get(verifier_id, Provider(id=verifier_id))


def _worst_price(providers: list[Provider], verifier: Provider | None) -> int | None:
    """Return the price when every provider is called and each match verified; None: a price is unknown."""
    prices = [to_micros(provider.price) for provider in providers]
    checks = [0 if verifier is None else to_micros(verifier.price)] * len(providers)
    known = [price for price in prices + checks if price is not None]
    return sum(known) if len(known) == len(prices + checks) else None
