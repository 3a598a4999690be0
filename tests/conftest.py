"""Fixtures: a sandbox API, a workspace with a job, a PostgreSQL server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from enrich.job.locations import LedgerLocation, parse_ledger_location
from tests.support import postgres as servers
from tests.support.cases import FULL
from tests.support.ledger import CommittingLedger
from tests.support.postgres import PostgresServer
from tests.support.workspace import SandboxApi, Workspace, make_leads, serve_api

# No deadline: a busy machine is slow. Derandomized: the same code sees the same examples everywhere.
settings.register_profile("few", deadline=None, derandomize=True, max_examples=12)
# `make stories` runs all of them …
settings.register_profile("full", deadline=None, derandomize=True, max_examples=FULL)
# … and `HYPOTHESIS_PROFILE=explore make stories` for new ones.
settings.register_profile("explore", deadline=None, max_examples=5 * FULL)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))

#: Name of the variable with the folder of the server that all pytest processes share.
POSTGRES_FOLDER_VARIABLE = "ENRICH_TESTS_POSTGRES"


# Containers often disable bytecode; then each pytest process rewrites the assertions of all tests again.
sys.dont_write_bytecode = False


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the shared server; it ends with the last pytest process."""
    if not hasattr(config, "workerinput"):
        lifetime = servers.ServerLifetime()
        os.environ[POSTGRES_FOLDER_VARIABLE] = str(lifetime.folder)
        config.add_cleanup(lifetime.close)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[SandboxApi]:
    """Serve an API that answers immediately and never fails."""
    with serve_api(tmp_path / "api.db") as served:
        yield served


@pytest.fixture
def backend() -> str:
    """Choose where a test's ledgers are: in a `file` or on a `server`. Modules that cover both override this."""
    return "file"


@pytest.fixture
def ledger_location(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> LedgerLocation:
    """Return the location of a ledger that does not exist yet."""
    if backend == "file":
        return tmp_path / "ledger.db"
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return parse_ledger_location(tmp_path, postgres.ledger_url(), tmp_path)


@pytest.fixture
def ledger(ledger_location: LedgerLocation) -> Iterator[CommittingLedger]:
    """Open a new ledger."""
    ledger = CommittingLedger.open(ledger_location)
    yield ledger
    ledger.wrapped.close()


@pytest.fixture
def workspace(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Workspace:
    """Make an empty folder with the standard job."""
    folder = tmp_path / "office"
    folder.mkdir()
    made = Workspace(folder)
    if backend == "server":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        made = Workspace(folder, postgres.ledger_url(), postgres.environ)
    made.write_job()
    return made


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Serve object storage."""
    from tests.support.object_storage import serve_s3  # noqa: PLC0415 - few tests need it, and it is slow to import

    with serve_s3() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str) -> Iterator[dict[str, str]]:
    """Make a bucket; the environment points to it."""
    from tests.support.object_storage import make_bucket  # noqa: PLC0415 - likewise

    with make_bucket(endpoint) as variables:
        yield variables


@pytest.fixture
def finished_run(api: SandboxApi, workspace: Workspace) -> Workspace:
    """Make a workspace whose job has run."""
    workspace.write_leads(make_leads(12))
    workspace.run_in_process("run", "job.yaml", api=api)
    return workspace


@pytest.fixture(scope="session")
def _shared_postgres() -> PostgresServer:
    """Start the shared server in the first pytest process that needs it."""
    if not servers.find_binaries():
        pytest.skip(servers.NOT_INSTALLED)
    return servers.shared_server(Path(os.environ[POSTGRES_FOLDER_VARIABLE]))


@pytest.fixture
def postgres(_shared_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """Return the shared server, which tests must not stop; the schemas of its URLs belong to the test."""
    server = replace(_shared_postgres, schemas=[])
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    yield server
    server.drop_schemas()


@pytest.fixture
def own_postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """Start a server that the test may stop and restart."""
    if not servers.find_binaries():
        pytest.skip(servers.NOT_INSTALLED)
    with servers.dedicated_server() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        yield server
