"""`enrich waterfalls` and `enrich enrichments`: what the API offers, with params, fields, providers and prices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from enrich.commands import options
from enrich.databar.client import MIN_QUERY_LENGTH
from enrich.databar.description import Description, Enrichment, Provider, Waterfall, format_price
from enrich.databar.environment import ApiAccess
from enrich.errors import JobError, JobRejected, suggest_name
from enrich.job.target import Target, TargetKind
from enrich.models import parse_count
from enrich.run.preflight import call_api


def list_descriptions(access: ApiAccess, kind: TargetKind, query: str | None = None) -> list[Description]:
    """List what the API offers. Raises ApiUnreachable and ApiKeyRejected."""
    return call_api(access, lambda client: client.list_descriptions(kind, query))


def read_description(access: ApiAccess, target: Target) -> Description:
    """Fetch one description. Raises JobError for an unknown target, ApiUnreachable and ApiKeyRejected."""
    try:
        return call_api(access, lambda client: client.get_description(target))
    except JobRejected as error:
        hint = suggest_name(target.id, [each.identifier for each in list_descriptions(access, target.kind)])
        raise JobError(f"the API has no {target.kind} `{target.id}`", hint) from error


def format_list(available: Sequence[Description]) -> Iterator[str]:
    """Format descriptions as text, a line each."""
    width = max((len(each.identifier) for each in available), default=0)
    for each in available:
        price = f"  {each.price_text}" if isinstance(each, Enrichment) else ""
        yield f"{each.identifier:<{width}}  {each.name}{price}".rstrip()


def format_description(described: Description) -> Iterator[str]:
    """Format a description as text, with params, fields and prices."""
    yield f"{described.identifier}  {described.name}".rstrip()
    if described.description:
        yield f"  {described.description}"
    yield "  params"
    for param in described.input_params:
        choices = f": {', '.join(choice.id for choice in param.choices)}" if param.choices else ""
        yield f"    {param.name:<24}{param.type}{', required' if param.required else ''}{choices}"
    yield "  fields"
    for field in described.output_fields:
        yield f"    {field.name:<24}{field.label or ''}".rstrip()
    if isinstance(described, Waterfall):
        yield "  providers (enrichments)"
        yield from _provider_lines(described.available_enrichments)
        if described.is_email_verifying:
            yield "  verifiers (email_verifier)"
            yield from _provider_lines(described.email_verifiers)
        return
    yield f"  price: {described.price_text}"
    if described.data_source:
        yield f"  source: {described.data_source}"


def _provider_lines(providers: list[Provider]) -> Iterator[str]:
    for provider in providers:
        only_named = "" if provider.enabled_by_default else ", only when named"
        yield f"    {provider.id:<8}{provider.name:<24}{format_price(provider.price)}{only_named}"


_SANDBOX_OPTION = click.option("--sandbox", "use_sandbox", is_flag=True, help="Use the built-in sandbox.")


@click.command()
@click.argument("identifier", required=False)
@_SANDBOX_OPTION
@options.JSON_OPTION
def waterfalls(identifier: str | None, use_sandbox: bool, as_json: bool) -> None:
    """List the waterfalls of the API, or show one with its params, fields, providers and prices."""
    target = Target(TargetKind.WATERFALL, identifier) if identifier else None
    _show(TargetKind.WATERFALL, target, None, use_sandbox=use_sandbox, as_json=as_json)


@click.command()
@click.argument("query", required=False)
@_SANDBOX_OPTION
@options.JSON_OPTION
def enrichments(query: str | None, use_sandbox: bool, as_json: bool) -> None:
    """List the enrichments of the API, those that contain QUERY, or show the one with the number QUERY."""
    number = parse_count(query or "")
    target = None if number is None else Target(TargetKind.ENRICHMENT, str(number))
    _show(TargetKind.ENRICHMENT, target, query, use_sandbox=use_sandbox, as_json=as_json)


def _show(kind: TargetKind, target: Target | None, query: str | None, *, use_sandbox: bool, as_json: bool) -> None:
    with options.open_access(None, use_sandbox=use_sandbox) as access:
        if target is None:
            listed = list_descriptions(access, kind, query)
            found = [each for each in listed if _matches(each, query)]
        else:
            found = [read_description(access, target)]
    if not found and not as_json:
        click.echo(f"no {kind.value} matches" if query else f"there is no {kind.value}", err=True)
        return
    documents = [each.model_dump() for each in found]
    if target is None:
        options.echo_result(documents, format_list(found), as_json=as_json)
    else:
        options.echo_result(documents[0], format_description(found[0]), as_json=as_json)


def _matches(described: Description, query: str | None) -> bool:
    """Check whether a text is in a description. The API searches only for texts of three characters and more."""
    if query is None or len(query) >= MIN_QUERY_LENGTH:
        return True
    source = described.data_source if isinstance(described, Enrichment) else ""
    return query.casefold() in f"{described.name} {described.description or ''} {source}".casefold()
