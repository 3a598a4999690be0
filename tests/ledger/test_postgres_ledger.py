"""A ledger on PostgreSQL: login, schemas and versions, concurrency, and the errors for each of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from enrich.errors import CommandRefused
from enrich.exit_codes import ExitCode
from enrich.ledger import schema
from enrich.ledger.database import Database
from enrich.ledger.lock import is_locked, lock_ledger
from enrich.ledger.verify import check_ledger
from tests.support.postgres import PostgresServer
from tests.support.postgres_pooler import postgres_pooler
from tests.support.workspace import SandboxApi, Workspace, kill_process, make_leads, serve_api, wait_until

pytestmark = pytest.mark.long


@pytest.fixture
def backend() -> str:
    """Use a ledger on a server."""
    return "server"


@pytest.mark.parametrize("answer", ["[]", "{"])
def test_answer_that_is_no_object_is_named(api: SandboxApi, workspace: Workspace, answer: str) -> None:
    """An answer that is no JSON object is exit 5, and the message names its attempt."""
    workspace.write_leads(make_leads(2))
    assert workspace.run_job(api).exit_code == 0
    with closing(Database(workspace.ledger_location)) as ledger, ledger.transaction():
        ledger.execute("UPDATE attempts SET answer = ? WHERE id = 2", (answer,))

    result = workspace.run_in_process("collect", "job.yaml")

    assert (result.exit_code, "Traceback" in result.stderr) == (5, False), result.stderr
    assert "attempts.answer, id 2: not a JSON object" in result.stderr
    assert "pg_restore" in result.stderr


# The password


def test_password_from_environment(api: SandboxApi, workspace: Workspace) -> None:
    """PGPASSWORD is used as by every libpq program; the password is in no file of ours and no output."""
    workspace.write_leads(make_leads(3))

    result = workspace.run_subprocess("run", "job.yaml", "--json", "--log-file", "run.log", api=api)

    assert (result.exit_code, result.json_output["found"] + result.json_output["not_found"]) == (0, 3), result.stderr
    secret = workspace.environ["PGPASSWORD"]
    assert secret not in result.stdout + result.stderr
    assert all(secret.encode() not in path.read_bytes() for path in workspace.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("named", [True, False])
def test_password_from_file(api: SandboxApi, workspace: Workspace, postgres: PostgresServer, *, named: bool) -> None:
    """The password is read from ~/.pgpass or from the file that PGPASSFILE names."""
    workspace.write_leads(make_leads(1))
    secrets = workspace.folder / ("secrets" if named else ".pgpass")
    secrets.write_text(f"127.0.0.1:{postgres.port}:enrich:enrich:{postgres.password}\n")
    secrets.chmod(0o600)

    variables = {"PGPASSFILE": str(secrets)} if named else {}
    result = replace(workspace, environ=variables).run_subprocess("run", "job.yaml", api=api)

    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("url", ["postgresql://enrich:secret@{}/enrich", "postgresql://{}/enrich?password=secret"])
def test_password_in_job_is_refused(workspace: Workspace, api: SandboxApi, postgres: PostgresServer, url: str) -> None:
    """A password in the job file is refused and not shown."""
    workspace.write_job(ledger=url.format(f"127.0.0.1:{postgres.port}"))

    result = workspace.run_in_process("run", "job.yaml", api=api)

    assert (result.exit_code, "without a password" in result.stderr, "secret" in result.stderr) == (2, True, False)
    assert "job.yaml:" in result.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PGPASSWORD": "wrong"}, ["password authentication failed", "hint: set PGPASSWORD"]),
        ({}, ["no password supplied", "hint: set PGPASSWORD"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "status"])
def test_login_failure(
    api: SandboxApi, workspace: Workspace, command: str, variables: dict[str, str], words: list[str]
) -> None:
    """A failed login is exit 5 with a remedy for every command, and no paid request was sent."""
    workspace.write_leads(make_leads(1))

    result = replace(workspace, environ=variables).run_in_process(command, "job.yaml", api=api)

    assert result.exit_code == ExitCode.REFUSED
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert api.audit()["accepted"] == 0


# Servers, schemas and versions


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql://enrich@127.0.0.1:1/enrich", "refused"),
        ("postgresql://enrich@{}/nothing", 'database "nothing" does not exist'),
        ("postgresql://nobody@{}/enrich", "authentication failed"),
    ],
)
def test_unreachable_server(
    api: SandboxApi, workspace: Workspace, postgres: PostgresServer, url: str, word: str
) -> None:
    """An unreachable server's error names it with a hint; read-only commands don't wait for it."""
    workspace.write_leads(make_leads(1))
    workspace.write_job(ledger=url.format(f"127.0.0.1:{postgres.port}"))

    result = workspace.run_in_process("status", "job.yaml", api=api)

    assert (result.exit_code, word in result.stderr, "hint: " in result.stderr) == (ExitCode.REFUSED, True, True), (
        result.stderr
    )


def test_foreign_schema_is_refused(api: SandboxApi, workspace: Workspace, postgres: PostgresServer) -> None:
    """A schema with foreign tables is refused, and no ledger is made in it."""
    schema = postgres.ledger_url().rpartition("=")[2]
    with closing(postgres.connect()) as db:
        db.execute(f"CREATE SCHEMA {schema}")
        db.execute(f"CREATE TABLE {schema}.theirs AS SELECT 1 AS number")
        workspace.write_leads(make_leads(1))
        workspace.write_job(ledger=postgres.ledger_url(schema))

        result = workspace.run_in_process("run", "job.yaml", api=api)

        assert (result.exit_code, "this schema is no ledger of enrich" in result.stderr) == (ExitCode.REFUSED, True), (
            result.stderr
        )
        tables = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (schema,)).fetchall()
        assert tables == [("theirs",)]


@pytest.fixture
def guest_role(postgres: PostgresServer) -> Iterator[str]:
    """Make a role with the password `guest` that may log in but create nothing."""
    role = f"guest_{postgres.ledger_url().rpartition('=')[2]}"
    with closing(postgres.connect("postgres")) as db:
        db.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'guest'")
        yield role
        db.execute(f"DROP OWNED BY {role} CASCADE")
        db.execute(f"DROP ROLE {role}")


def test_prepared_schema_is_used(
    api: SandboxApi, workspace: Workspace, postgres: PostgresServer, guest_role: str
) -> None:
    """A role without the right to create schemas can use an empty one prepared for it; the error asks for that."""
    schema = postgres.ledger_url().rpartition("=")[2]
    workspace.write_leads(make_leads(1))
    workspace.write_job(ledger=postgres.ledger_url(schema, guest_role))
    refused = workspace.run_in_process("run", "job.yaml", api=api, PGPASSWORD="guest")
    with closing(postgres.connect("postgres")) as db:
        db.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {guest_role}")
    taken = workspace.run_in_process("run", "job.yaml", api=api, PGPASSWORD="guest")

    assert (refused.exit_code, "permission denied" in refused.stderr) == (ExitCode.REFUSED, True), refused.stderr
    assert "hint: grant CREATE on the database" in refused.stderr
    assert (taken.exit_code, taken.stderr) == (0, "")


# Databases that cannot hold a ledger


def assert_refused(workspace: Workspace, api: SandboxApi, reason: str, hint: str) -> None:
    """Check that commands refuse the ledger with a reason and a hint, and that nothing was sent."""
    workspace.write_leads(make_leads(1))
    for command in (("run", "job.yaml", "--json"), ("plan", "job.yaml"), ("status", "job.yaml")):
        result = workspace.run_in_process(*command, api=api)
        assert (result.exit_code, reason in result.stderr) == (ExitCode.REFUSED, True), result.stderr
        assert f"hint: {hint}" in result.stderr
        assert "Traceback" not in result.stderr
    assert api.audit()["accepted"] == 0


def test_database_of_other_encoding_is_refused(api: SandboxApi, workspace: Workspace, postgres: PostgresServer) -> None:
    """A database that cannot hold every character of a lead is refused before anything is sent."""
    name = f"latin_{postgres.ledger_url().rpartition('=')[2]}"
    with closing(postgres.connect("postgres")) as db:
        db.execute(f"CREATE DATABASE {name} OWNER enrich TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
        try:
            workspace.write_job(ledger=f"postgresql://enrich@127.0.0.1:{postgres.port}/{name}")
            assert_refused(
                workspace, api, "the encoding of the database is LATIN1", "make one with createdb --encoding=UTF8"
            )
        finally:
            db.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_role_without_temporary_tables_is_refused(
    api: SandboxApi, workspace: Workspace, postgres: PostgresServer, guest_role: str
) -> None:
    """A role that may not create temporary tables is refused with the grant that it lacks."""
    name = f"closed_{guest_role}"
    with closing(postgres.connect("postgres")) as db:
        db.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            db.execute(f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")
            db.execute(f"GRANT CREATE ON DATABASE {name} TO {guest_role}")
            workspace.write_job(ledger=f"postgresql://{guest_role}@127.0.0.1:{postgres.port}/{name}")
            closed = replace(workspace, environ={"PGPASSWORD": "guest"})
            grant = f"GRANT TEMPORARY ON DATABASE {name} TO {guest_role}"
            assert_refused(closed, api, "this user may not create temporary tables", grant)
        finally:
            db.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("per_transaction", [True, False])
def test_pooler(api: SandboxApi, workspace: Workspace, postgres: PostgresServer, *, per_transaction: bool) -> None:
    """A pooler that gives each transaction another connection is refused; one that keeps sessions is not."""
    with postgres_pooler(postgres.port, per_transaction=per_transaction) as port:
        workspace.write_job(ledger=str(workspace.server_url).replace(f":{postgres.port}/", f":{port}/"))
        if per_transaction:
            assert_refused(
                workspace,
                api,
                "a connection pooler gives each transaction another connection",
                "name the server itself, or a pool in session mode",
            )
        else:
            workspace.write_leads(make_leads(3))
            assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == ExitCode.OK


@pytest.mark.parametrize(("version", "word"), [(99, "newer version"), (0, "older version")])
def test_ledger_of_other_version(workspace: Workspace, version: int, word: str) -> None:
    """A read-only command neither reads nor changes a ledger of another version."""
    Database(workspace.ledger_location).close()
    workspace.sql("UPDATE ledger_version SET version = ?", version)

    result = workspace.run_in_process("report", "job.yaml")

    assert (result.exit_code, word in result.stderr) == (ExitCode.REFUSED, True), result.stderr
    assert workspace.sql("SELECT version FROM ledger_version") == [(version,)]


def test_prerelease_ledger_is_refused(api: SandboxApi, workspace: Workspace) -> None:
    """A ledger from before the first release is neither read nor changed; the error shows what to do."""
    Database(workspace.ledger_location).close()
    workspace.sql("ALTER TABLE ledger_version RENAME TO ledger")
    workspace.write_leads(make_leads(1))
    for command in ("run", "report", "status"):
        result = workspace.run_in_process(command, "job.yaml", api=api)
        assert (result.exit_code, "before its first release" in result.stderr) == (ExitCode.REFUSED, True), (
            result.stderr
        )


def test_older_ledger_is_migrated_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next writer migrates an older ledger; several at once take turns, and all see it complete."""
    Database(workspace.ledger_location).close()
    step = "CREATE TABLE remarks (id BIGINT PRIMARY KEY);\n\nINSERT INTO remarks VALUES (1)"
    monkeypatch.setattr(schema, "POSTGRES_MIGRATIONS", [*schema.POSTGRES_MIGRATIONS, step])

    with ThreadPoolExecutor() as several:
        for ledger in several.map(lambda _: Database(workspace.ledger_location), range(4)):
            ledger.close()

    assert workspace.sql("SELECT version FROM ledger_version") == [(len(schema.POSTGRES_MIGRATIONS),)]
    assert workspace.sql("SELECT id FROM remarks") == [(1,)]


def test_failed_migration_rolls_back(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """All migration steps to the newest version are one transaction, so a failed one changes nothing."""
    Database(workspace.ledger_location).close()
    version = workspace.sql("SELECT version FROM ledger_version")
    steps = ["CREATE TABLE remarks (id BIGINT PRIMARY KEY)", "INSERT INTO remarks VALUES (1);\n\nSELECT 1 / 0"]
    with monkeypatch.context() as newer:
        newer.setattr(schema, "POSTGRES_MIGRATIONS", [*schema.POSTGRES_MIGRATIONS, *steps])
        with pytest.raises(CommandRefused, match="division by zero"):
            Database(workspace.ledger_location)

    assert workspace.sql("SELECT version FROM ledger_version") == version
    assert workspace.sql("SELECT to_regclass('remarks')") == [(None,)]
    Database(workspace.ledger_location).close()


def test_sandbox_schema_is_separate(workspace: Workspace, postgres: PostgresServer) -> None:
    """The sandbox has a schema of its own beside the real one and finds it again."""
    workspace.write_leads(make_leads(2))

    first = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json")
    second = workspace.run_in_process("run", "job.yaml", "--sandbox", "--json")

    assert (first.json_output["submitted"], second.json_output["submitted"], second.json_output["reused"]) == (2, 0, 2)
    name = str(workspace.server_url).rpartition("=")[2]
    with closing(postgres.connect()) as db:
        rows = db.execute("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, %s)", (name,)).fetchall()
    assert rows == [(f"{name}_sandbox",)]


def test_ledger_from_environment(api: SandboxApi, workspace: Workspace) -> None:
    """`ENRICH_LEDGER` replaces the job file's ledger, so one job runs on a laptop and in a cluster."""
    url = str(workspace.server_url)
    plain = Workspace(workspace.folder, environ=workspace.environ)
    plain.write_job()
    plain.write_leads(make_leads(2))

    result = plain.run_in_process("run", "job.yaml", "--json", api=api, ENRICH_LEDGER=url)

    assert (result.exit_code, result.json_output["submitted"]) == (0, 2)
    assert not plain.ledger_path.exists()
    assert workspace.sql("SELECT count(*) FROM requests") == [(2,)]


# One run at a time


def test_concurrent_run_is_exit_11(tmp_path: Path, workspace: Workspace) -> None:
    """Only one run at a time holds the ledger; a second one on any machine is exit 11."""
    workspace.write_leads(make_leads(20))
    with serve_api(tmp_path / "api.db", latency="fixed(0.5)") as api, lock_ledger(workspace.ledger_location, 0):
        assert is_locked(workspace.ledger_location)
        assert workspace.run_in_process("run", "job.yaml", api=api).exit_code == ExitCode.LOCKED
        assert workspace.run_in_process("run", "job.yaml", "--if-locked", "skip", api=api).exit_code == ExitCode.OK
    assert not is_locked(workspace.ledger_location)


def test_restart_right_after_kill(workspace: Workspace) -> None:
    """A run restarted right after a kill is not refused because of the killed run."""
    killed_lock = lock_ledger(workspace.ledger_location, 0)
    killed_lock.__enter__()
    release_timer = threading.Timer(0.7, killed_lock.__exit__, (None, None, None))
    release_timer.start()
    with lock_ledger(workspace.ledger_location, 0):
        pass
    release_timer.join()


def test_lock_released_by_killed_run(tmp_path: Path, workspace: Workspace) -> None:
    """A killed run's lock ends with its connection; the next run marks its POSTs in doubt and buys nothing twice."""
    workspace.write_job(ledger=f"{workspace.server_url}&lease=1")
    workspace.write_leads(make_leads(60))
    with serve_api(tmp_path / "api.db", latency="uniform(0.2,0.6)") as api:
        process = workspace.start_subprocess("run", "job.yaml", api=api)
        wait_until(lambda: api.audit()["requests"].get("run", 0) >= 20)
        kill_process(process)
        result = workspace.run_subprocess("run", "job.yaml", "--json", api=api)
        audit = api.audit()

    assert result.exit_code in {ExitCode.OK, ExitCode.IN_DOUBT}, result.stderr
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    assert check_ledger(workspace.ledger_location).problems == []
