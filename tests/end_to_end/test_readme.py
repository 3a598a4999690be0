"""The README is correct: its commands run and print what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from enrich import __version__
from enrich.cli import cli
from enrich.job.job import load_job
from enrich.job.spec import json_schema
from tests.support.documents import ROOT, check_console, fenced_blocks, make_checkout, run_shell
from tests.support.workspace import INSTANT_API, serve_api

README = ROOT / "README.md"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkout whose .venv is the one that runs the tests."""
    return make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.mark.long
def test_readme_console_output(checkout: Path) -> None:
    """Every `$ command` of the README prints the output below it, in the README's order."""
    assert check_console(README, checkout) >= 3


@pytest.mark.long
def test_readme_api_commands(checkout: Path, tmp_path: Path) -> None:
    """The commands with a key run unchanged against an API that accepts this key."""
    (block,) = fenced_blocks(README, "sh")
    with serve_api(tmp_path / "api.db", INSTANT_API, api_key="your-key") as api:
        message = run_shell(block, checkout, DATABAR_BASE_URL=api.base_url)
        accepted = api.audit()["accepted"]
    assert "email_getter" in message
    assert accepted == 232


def test_readme_example_job() -> None:
    """The shown job file is `jobs/leads.yaml`."""
    (block,) = fenced_blocks(README, "yaml")
    assert block in (ROOT / "jobs" / "leads.yaml").read_text(encoding="utf-8")


def test_readme_mentions_every_command() -> None:
    """The README mentions every command."""
    for name in cli.list_commands(click.Context(cli)):
        assert f"enrich {name}" in README.read_text(encoding="utf-8")


def test_shipped_schema_is_current() -> None:
    """`jobs/schema.json` is what `enrich schema` prints, and every job points to it."""
    assert json.loads((ROOT / "jobs" / "schema.json").read_text(encoding="utf-8")) == json_schema()
    jobs = sorted((ROOT / "jobs").glob("*.yaml"))
    assert len(jobs) >= 2
    for job in jobs:
        assert job.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
        load_job(job)


def test_changelog_names_version() -> None:
    """The changelog has a heading for the next or this version."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in changelog or f"## {__version__}" in changelog
