"""Fixtures: a sandbox API, a workspace with a job, a PostgreSQL server.

The program, the sandbox and the servers are imported by the fixtures: pytest's first process, which only distributes
the tests, imports this file, too, before it starts the others.
"""

# ruff: noqa: PLC0415
from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import program
from tests.support.server_lifetime import ServerLifetime

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import Scheduling

    from enrich.job.locations import LedgerLocation
    from tests.support.ledger import CommittingLedger
    from tests.support.postgres import PostgresServer
    from tests.support.workspace import SandboxApi, Workspace

#: Name of the variable with the folder of the servers that all pytest processes share.
SERVER_FOLDER_VARIABLE = "ENRICH_TESTS_SERVERS"
#: How much memory must be free to have the tests' files there. All tests together write less than one GiB.
FREE_MEMORY = 4 << 30
#: Tests that share a Ray cluster, or a browser and the pages in it.
SHARE_SOMETHING_COSTLY = ("tests/cluster/", "tests/report/test_page.py")


# Containers often disable bytecode; then each pytest process compiles Hypothesis and all tests anew, to rewrite their
# assertions.
sys.dont_write_bytecode = False


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the shared servers; they end with the last pytest process."""
    if not hasattr(config, "workerinput"):
        # The tests are the parallel work. On small tables, threads cost a seventh of the processor time of a run.
        os.environ.setdefault("POLARS_MAX_THREADS", "1")
        keep_files_in_memory()
        lifetime = ServerLifetime()
        os.environ[SERVER_FOLDER_VARIABLE] = str(lifetime.folder)
        config.add_cleanup(lifetime.close)
    program.server_folder = Path(os.environ[SERVER_FOLDER_VARIABLE])
    if hasattr(config, "workerinput") or config.getvalue("dist") == "no":
        gc.disable()  # until all is imported
        load_hypothesis_profile()


def keep_files_in_memory() -> None:
    """Have the folders of tests in memory, if it is large: a sixth less processor time, and no waiting for a disk."""
    memory = "/dev/shm"  # noqa: S108 - pytest makes a folder of its own in it
    if os.access(memory, os.W_OK):
        system = os.statvfs(memory)
        runs_programs = not system.f_flag & os.ST_NOEXEC
        if runs_programs and system.f_bavail * system.f_frsize > FREE_MEMORY:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", memory)


def load_hypothesis_profile() -> None:
    """Choose how many examples each property has. Imported here, as the first process, which runs no test, need not."""
    from hypothesis import settings

    from tests.support.cases import FULL

    # No deadline: a busy machine is slow. Derandomized: the same code sees the same examples everywhere.
    settings.register_profile("few", deadline=None, derandomize=True, max_examples=6)
    # `make stories` runs all of them. Properties of functions have 60 to 200 examples; those whose example is a whole
    # run have 4 to 8, as each has a history of several runs; the stateful ones of the ledger have 40 times 40 steps,
    # enough for every rule to follow every other, …
    settings.register_profile("full", deadline=None, derandomize=True, max_examples=FULL)
    # … and `PYTEST_TIMEOUT=3600 HYPOTHESIS_PROFILE=explore make stories` for new ones.
    settings.register_profile("explore", deadline=None, max_examples=5 * FULL)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


def pytest_collection_finish() -> None:
    """Exempt from garbage collection what stays to the end: going over it again and again costs 5 % of the time."""
    gc.freeze()
    gc.enable()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """With `--dist loadscope`, run tests that share something costly in one process. None: the default."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class CostlyInOneProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((costly for costly in SHARE_SOMETHING_COSTLY if nodeid.startswith(costly)), nodeid)

    return CostlyInOneProcess(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With all tests, begin with the long ones: at the end no process should wait for one."""
    if not config.option.markexpr:
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[SandboxApi]:
    """Serve an API that answers immediately and never fails."""
    from tests.support.workspace import serve_api

    with serve_api(tmp_path / "api.db") as served:
        yield served


@pytest.fixture
def backend() -> str:
    """Choose where a test's ledgers are: in a `file` or on a `server`. Modules that cover both override this."""
    return "file"


@pytest.fixture
def ledger_location(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> LedgerLocation:
    """Return the location of a ledger that does not exist yet."""
    from enrich.job.locations import parse_ledger_location

    if backend == "file":
        return tmp_path / "ledger.db"
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return parse_ledger_location(tmp_path, postgres.ledger_url(), tmp_path)


@pytest.fixture
def ledger(ledger_location: LedgerLocation) -> Iterator[CommittingLedger]:
    """Open a new ledger."""
    from tests.support.ledger import CommittingLedger

    ledger = CommittingLedger.open(ledger_location)
    yield ledger
    ledger.wrapped.close()


@pytest.fixture
def workspace(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Workspace:
    """Make an empty folder with the standard job."""
    from tests.support.workspace import Workspace

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
    from tests.support.object_storage import serve_s3

    with serve_s3() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str) -> Iterator[dict[str, str]]:
    """Make a bucket; the environment points to it."""
    from tests.support.object_storage import make_bucket

    with make_bucket(endpoint) as variables:
        yield variables


@pytest.fixture
def finished_run(api: SandboxApi, workspace: Workspace) -> Workspace:
    """Make a workspace whose job has run."""
    from tests.support.workspace import make_leads

    workspace.write_leads(make_leads(12))
    workspace.run_in_process("run", "job.yaml", api=api)
    return workspace


@pytest.fixture(scope="session")
def _shared_postgres() -> PostgresServer:
    """Start the shared server in the first pytest process that needs it."""
    from tests.support import postgres as servers

    if not servers.find_binaries():
        pytest.skip(servers.NOT_INSTALLED)
    return servers.shared_server(Path(os.environ[SERVER_FOLDER_VARIABLE]))


@pytest.fixture
def postgres(_shared_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """Return the shared server, which tests must not stop; the schemas of its URLs belong to the test."""
    server = replace(_shared_postgres, schemas=[])
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    yield server
    server.drop_schemas()


@pytest.fixture(scope="session")
def _own_postgres() -> Iterator[PostgresServer]:
    """Start a server for the tests of this pytest process that stop and restart it."""
    from tests.support import postgres as servers

    if not servers.find_binaries():
        pytest.skip(servers.NOT_INSTALLED)
    with servers.dedicated_server() as server:
        yield server


@pytest.fixture
def own_postgres(_own_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """Return a server that the test may stop and restart; afterwards it runs again, without connections."""
    for name, value in _own_postgres.environ.items():
        monkeypatch.setenv(name, value)
    yield _own_postgres
    _own_postgres.restart("immediate")
