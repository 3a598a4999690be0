"""`enrich schema`: prints the JSON Schema of the job file."""

from __future__ import annotations

import json

import click

from enrich.job.spec import json_schema


@click.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
