"""Fixtures: an API that serves and an office with a job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.harness import Api, Office, people, serving

# On a machine that is busy an example takes as long as it takes; the same code sees the same examples everywhere.
settings.register_profile("same", deadline=None, derandomize=True, max_examples=60)
# `HYPOTHESIS_PROFILE=explore make test` looks for new ones.
settings.register_profile("explore", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


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


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Serve a storage."""
    from tests.buckets import serving_storage  # noqa: PLC0415 - few tests need it, and it is slow to import

    with serving_storage() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str) -> Iterator[dict[str, str]]:
    """Make a bucket in the storage; what points to it is in the environment."""
    from tests.buckets import new_bucket  # noqa: PLC0415 - likewise

    with new_bucket(endpoint) as variables:
        yield variables


@pytest.fixture
def done(api: Api, office: Office) -> Office:
    """Make an office whose job has run."""
    office.write_leads(people(12))
    office.command("run", "job.yaml", api=api)
    return office
