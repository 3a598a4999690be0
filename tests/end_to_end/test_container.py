"""The container image: its file has no known problem, and its steps make an image that runs a job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from enrich.cli import cli
from tests.end_to_end.test_documentation import parse_command_line
from tests.support.container import CONTAINERFILE, can_build, lint, offline_settings, parse_stages, run_image
from tests.support.documents import ROOT

TEXT = CONTAINERFILE.read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "container"


def test_the_containerfile_has_no_problems() -> None:
    """Versions, files one by one, no secrets, no cache, a user without rights, programs in the JSON form."""
    assert list(lint(TEXT)) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("python:3.11-slim\nCOPY", "python:latest\nCOPY", "a version"),
        ("USER 10001:10001", "USER 0:0", "USER that is a number"),
        ("USER 10001:10001", "USER enrich", "USER that is a number"),
        ('ENTRYPOINT ["enrich"]', "ENTRYPOINT enrich", "one ENTRYPOINT"),
        ("COPY enrich ./enrich", "COPY . .", "one by one"),
        ("COPY enrich ./enrich", "COPY nothing ./enrich", "one by one"),
        ("ARG EXTRAS=", "ARG API_KEY=", "no secret"),
        (" --no-cache-dir", "", "cache"),
        ("WORKDIR /data", "RUN true", "after USER"),
        ("COPY enrich ./enrich", "ADD enrich ./enrich", "ADD is not"),
    ],
)
def test_the_lint_finds_problems(old: str, new: str, problem: str) -> None:
    """Each rule finds a change of the file that breaks it."""
    assert old in TEXT
    assert any(problem in found for found in lint(TEXT.replace(old, new)))


@pytest.mark.long
@pytest.mark.skipif(not can_build(), reason="needs root on Linux, with mounts of its own")
def test_the_steps_make_an_image_that_runs_a_job(tmp_path: Path) -> None:
    """In a clean root folder the steps succeed; a job then runs as the image's user with a read-only root."""
    pytest.importorskip("hatchling")
    done = run_image(tmp_path, *offline_settings())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["submitted"] == 3
    output = tmp_path / "volume" / "out" / "leads_enriched.sandbox.csv"
    assert (output.stat().st_uid, output.stat().st_mode & 0o777) == (10001, 0o600)


def test_the_compose_example_fits_the_image() -> None:
    """Its command exists, its root is read-only, its volume is the image's, and its key comes from a secret."""
    service = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))["services"]["enrich"]
    parse_command_line(service["command"])
    assert service["command"][0] in cli.list_commands(None)  # type: ignore[arg-type]
    (volume,) = service["volumes"]
    assert volume.endswith(f":{parse_stages(TEXT)[-1].values('VOLUME')[0][0]}")
    assert (EXAMPLES / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == CONTAINERFILE
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["environment"]["DATABAR_API_KEY_FILE"] == f"/run/secrets/{service['secrets'][0]}"


def test_the_crontab_starts_the_service() -> None:
    """The line has five fields for the time, and names the service of the compose example."""
    text = (EXAMPLES / "crontab").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if not line.startswith("#"))
    assert re.fullmatch(r"(\S+ ){5}cd \S+ && docker compose run --rm -T enrich", line)
