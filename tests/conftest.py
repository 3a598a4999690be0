"""Fixtures: an API that serves and an office with a job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.harness import Api, Office, serving

# On a machine that is busy an example takes as long as it takes.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """Serve an API that answers at once and never fails."""
    with serving(tmp_path / "api.db") as served:
        yield served


@pytest.fixture
def office(tmp_path: Path) -> Office:
    """Make an empty folder with the standard job."""
    folder = tmp_path / "office"
    folder.mkdir()
    made = Office(folder)
    made.write_job()
    return made
