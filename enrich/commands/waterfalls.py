"""`enrich waterfalls`: lists the waterfalls of the API with their params, fields, providers and prices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import click

from enrich.commands import options
from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.credentials import ApiAccess
from enrich.databar.waterfall import Provider, Waterfall
from enrich.errors import JobError, JobRejected
from enrich.job.job import suggest_name
from enrich.run.preflight import retry_until
from enrich.run.state import Timeouts


def read_waterfalls(access: ApiAccess, identifier: str | None) -> list[Waterfall]:
    """Fetch one waterfall (None: all). Raises JobError for an unknown one, ApiUnreachable and ApiKeyRejected."""
    return asyncio.run(_fetch_waterfalls(access, identifier))


async def _fetch_waterfalls(access: ApiAccess, identifier: str | None) -> list[Waterfall]:
    at_most_s = Timeouts().startup_s
    async with Client(access, SystemClock()) as client:
        if identifier is None:
            return await retry_until(client.list_waterfalls, at_most_s)
        try:
            return [await retry_until(lambda: client.get_waterfall(identifier), at_most_s)]
        except JobRejected as error:
            known = await retry_until(client.list_waterfalls, at_most_s)
            hint = suggest_name(identifier, [waterfall.identifier for waterfall in known])
            raise JobError(f"the API has no waterfall `{identifier}`", hint) from error


def format_waterfalls(available: list[Waterfall], *, detailed: bool) -> Iterator[str]:
    """Format waterfalls as text: one line each, with `detailed` also params, fields and providers."""
    width = max((len(waterfall.identifier) for waterfall in available), default=0)
    for waterfall in available:
        yield f"{waterfall.identifier:<{width}}  {waterfall.name}".rstrip()
        if not detailed:
            continue
        if waterfall.description:
            yield f"  {waterfall.description}"
        yield "  params"
        for param in waterfall.input_params:
            yield f"    {param.name:<24}{param.type}{', required' if param.required else ''}"
        yield "  fields"
        for field in waterfall.output_fields:
            yield f"    {field.name:<24}{field.label or ''}".rstrip()
        yield "  providers (enrichments)"
        yield from _provider_lines(waterfall.available_enrichments)
        if waterfall.is_email_verifying:
            yield "  verifiers (email_verifier)"
            yield from _provider_lines(waterfall.email_verifiers)


def _provider_lines(providers: list[Provider]) -> Iterator[str]:
    for provider in providers:
        price = "price unknown" if provider.price is None else f"{provider.price} credits"
        only_named = "" if provider.enabled_by_default else ", only when named"
        yield f"    {provider.id:<8}{provider.name:<24}{price}{only_named}"


@click.command()
@click.argument("identifier", required=False)
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Ask the built-in sandbox.")
@options.JSON_OPTION
def waterfalls(identifier: str | None, use_sandbox: bool, as_json: bool) -> None:
    """Show what the API offers: waterfalls, their params, fields, providers and prices."""
    with options.open_access(None, use_sandbox=use_sandbox) as access:
        available = read_waterfalls(access, identifier)
    if as_json:
        documents = [waterfall.model_dump() for waterfall in available]
        click.echo(json.dumps(documents[0] if identifier else documents, ensure_ascii=False))
    else:
        click.echo("\n".join(format_waterfalls(available, detailed=identifier is not None)))
