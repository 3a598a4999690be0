"""The README is correct: its commands run and print what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from enrich import __version__
from enrich.job.job import load_job
from enrich.job.spec import json_schema
from tests.support.documents import ROOT, check_console_block, make_checkout, run_shell, runnable_blocks
from tests.support.workspace import INSTANT_API, serve_api

README = ROOT / "README.md"


@pytest.mark.long
def test_readme_commands(tmp_path: Path) -> None:
    """All commands of the README run in its order: consoles print what is shown, others use an API with this key."""
    checkout, seen = make_checkout(tmp_path), set()
    with serve_api(tmp_path / "api.db", INSTANT_API, api_key="your-key") as api:
        for kind, block in runnable_blocks(README):
            if "pip install" in block:
                assert_installs_as_make(block)
            elif kind == "console":
                check_console_block(block, checkout)
            else:
                run_shell(block, checkout, DATABAR_BASE_URL=api.base_url)
                assert api.audit()["accepted"] == 234
            seen.add(kind)
    assert seen == {"console", "sh"}


def assert_installs_as_make(block: str) -> None:
    """Assert that the commands install what `make` installs into the .venv that this test uses."""
    rule = (ROOT / "Makefile").read_text(encoding="utf-8")
    (installed,) = re.findall(r"install --editable ('.*')", block)
    assert f"--editable {installed}\n" in rule


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
