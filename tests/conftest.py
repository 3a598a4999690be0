"""Fixtures: an API that serves, an office with a job, a PostgreSQL server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from enrich.place import LedgerPlace, locate_ledger
from tests import postgres as servers
from tests.books import Books
from tests.cases import FULL
from tests.harness import Api, Office, people, serving
from tests.postgres import Postgres

# On a machine that is busy an example takes as long as it takes; the same code sees the same examples everywhere.
settings.register_profile("few", deadline=None, derandomize=True, max_examples=12)
# `make stories` looks at all of them …
settings.register_profile("full", deadline=None, derandomize=True, max_examples=FULL)
# … and `HYPOTHESIS_PROFILE=explore make stories` for new ones.
settings.register_profile("explore", deadline=None, max_examples=5 * FULL)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))

#: Names the folder of the server that all processes of pytest share.
POSTGRES = "ENRICH_TESTS_POSTGRES"


# Containers often switch it off, and then each process of pytest prepares the assertions of all tests anew.
sys.dont_write_bytecode = False


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the server that the tests may share; it lives no longer than the process that outlives all others."""
    if not hasattr(config, "workerinput"):
        life = servers.Life()
        os.environ[POSTGRES] = str(life.folder)
        config.add_cleanup(life.end)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """Serve an API that answers at once and never fails."""
    with serving(tmp_path / "api.db") as served:
        yield served


@pytest.fixture
def where() -> str:
    """Say where the ledgers of a test lie: in a `file`, or on a `server`. Modules that are about both say so."""
    return "file"


@pytest.fixture
def place(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> LedgerPlace:
    """Name the place of a ledger that is not there yet."""
    if where == "file":
        return tmp_path / "ledger.db"
    postgres: Postgres = request.getfixturevalue("postgres")
    return locate_ledger(tmp_path, postgres.url(), tmp_path)


@pytest.fixture
def books(place: LedgerPlace) -> Iterator[Books]:
    """Open a new ledger."""
    opened = Books.open(place)
    yield opened
    opened.ledger.close()


@pytest.fixture
def office(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> Office:
    """Make an empty folder with the standard job."""
    folder = tmp_path / "office"
    folder.mkdir()
    made = Office(folder)
    if where == "server":
        postgres: Postgres = request.getfixturevalue("postgres")
        made = Office(folder, postgres.url(), postgres.environ)
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


@pytest.fixture(scope="session")
def _shared_postgres() -> Postgres:
    """Start the server that all tests share, in whichever process of pytest needs it first."""
    if not servers.find_binaries():
        pytest.skip(servers.ABSENT)
    return servers.share(Path(os.environ[POSTGRES]))


@pytest.fixture
def postgres(_shared_postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Postgres]:
    """Lend the server that all tests share: nobody may stop it; the schemas of its URLs are the test's own."""
    lent = replace(_shared_postgres, schemas=[])
    for name, value in lent.environ.items():
        monkeypatch.setenv(name, value)
    yield lent
    lent.drop_schemas()


@pytest.fixture
def own_postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[Postgres]:
    """Start a server that the test may stop and restart."""
    if not servers.find_binaries():
        pytest.skip(servers.ABSENT)
    with servers.serving_alone() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        yield server
