"""The README is true: its commands are run and say what it shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from enrich import __version__
from enrich.cli import cli
from enrich.job import load_job
from enrich.spec import json_schema
from tests.harness import CALM, serving

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose .venv is the one that runs the tests."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("jobs", "sample_data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".enrich"))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(command: str, folder: Path, **environ: str) -> str:
    """Run a line of the README as a person would."""
    # The checkout's .venv is there: make must not install it again.
    command = command.replace("make demo", "make --old-file=.venv/run --no-print-directory demo")
    path = f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder), "LANG": "C.UTF-8", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.replace(f"{folder}/", "")


def as_pattern(shown: str) -> str:
    """What must be said: all but times, the number of polls and what is left out by an ellipsis."""
    pattern = re.escape(shown.strip())
    pattern = pattern.replace("…", ".*")
    pattern = re.sub(r"\d{4}\\-\d\d\\-\d\dT\d\d:\d\d:\d\dZ", r"\\S{20}", pattern)
    pattern = re.sub(r"\d+\\ polls", r"\\d+ polls", pattern)
    return re.sub(r"\\ \d:\d\d\\ ", r"\\ \\d:\\d\\d\\ ", pattern)


def test_the_console_says_what_the_readme_shows(checkout: Path) -> None:
    """Every `$ command` of the README prints what stands below it, in the README's order."""
    shown = blocks("console")
    assert len(shown) >= 3
    for block in shown:
        command, _, expected = block.removeprefix("$ ").partition("\n")
        said = run(command, checkout).strip()
        assert re.fullmatch(as_pattern(expected), said, re.DOTALL), f"{command} says:\n{said}"


def test_the_commands_for_the_real_api_work(checkout: Path, tmp_path: Path) -> None:
    """The commands with a key run as they stand, against an API that accepts this key."""
    (block,) = blocks("sh")
    with serving(tmp_path / "api.db", CALM, api_key="your-key") as api:
        said = run(block, checkout, DATABAR_BASE_URL=api.base_url)
        accepted = api.audit()["accepted"]
    assert "email_getter" in said
    assert accepted == 232


def test_the_example_is_the_job_that_ships() -> None:
    """The job file shown is `jobs/leads.yaml`."""
    (block,) = blocks("yaml")
    assert block in (ROOT / "jobs" / "leads.yaml").read_text(encoding="utf-8")


def test_every_command_is_mentioned() -> None:
    """The README knows every command."""
    for name in cli.commands:
        assert f"enrich {name}" in README


def test_the_schema_beside_the_jobs_is_current() -> None:
    """`jobs/schema.json` is what `enrich schema` prints, and every job points to it."""
    assert json.loads((ROOT / "jobs" / "schema.json").read_text(encoding="utf-8")) == json_schema()
    jobs = sorted((ROOT / "jobs").glob("*.yaml"))
    assert len(jobs) >= 2
    for job in jobs:
        assert job.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
        load_job(job)


def test_the_changelog_names_the_version() -> None:
    """The changelog has a heading for what comes next or for this version."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in changelog or f"## {__version__}" in changelog
