"""`enrich waterfalls` and `enrich schema`: what sets a job up."""

from __future__ import annotations

import json

import click

from enrich.commands import options


@click.command()
@click.argument("identifier", required=False)
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Ask the built-in sandbox.")
@options.AS_JSON
def waterfalls(identifier: str | None, use_sandbox: bool, as_json: bool) -> None:
    """Show what the API offers: waterfalls, their params, fields, providers and prices."""
    from enrich.offer import lines, read_offer

    with options.access(None, use_sandbox=use_sandbox) as access:
        offer = read_offer(access, identifier)
    if as_json:
        told = [waterfall.model_dump() for waterfall in offer]
        click.echo(json.dumps(told[0] if identifier else told, ensure_ascii=False))
    else:
        click.echo("\n".join(lines(offer, whole=identifier is not None)))


@click.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from enrich.spec import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
