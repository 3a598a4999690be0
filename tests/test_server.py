"""A ledger on a server: how it is found and let in, who may have it, and what a person is told when it is not so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from enrich.errors import Exit, Refused
from enrich.store import schema
from enrich.store.ledger import Ledger
from enrich.store.lock import hold, is_held
from enrich.store.records import check
from tests.harness import Api, Office, kill, people, serving, until
from tests.postgres import Postgres


@pytest.fixture
def where() -> str:
    """Ask of a ledger on a server."""
    return "server"


# The password


@pytest.mark.long
def test_the_password_comes_from_the_environment(api: Api, office: Office) -> None:
    """PGPASSWORD, as for every program that speaks to PostgreSQL; it stands in no file of ours and in no output."""
    office.write_leads(people(3))

    done = office.enrich("run", "job.yaml", "--json", "--log-file", "run.log", api=api)

    assert (done.code, done.receipt["found"] + done.receipt["not_found"]) == (0, 3), done.stderr
    secret = office.environ["PGPASSWORD"]
    assert secret not in done.stdout + done.stderr
    assert all(secret.encode() not in path.read_bytes() for path in office.folder.rglob("*") if path.is_file())


@pytest.mark.long
@pytest.mark.parametrize("named", [True, False])
def test_the_password_comes_from_a_file(api: Api, office: Office, postgres: Postgres, *, named: bool) -> None:
    """~/.pgpass, or the one that PGPASSFILE names."""
    office.write_leads(people(1))
    secrets = office.folder / ("secrets" if named else ".pgpass")
    secrets.write_text(f"127.0.0.1:{postgres.port}:enrich:enrich:{postgres.password}\n")
    secrets.chmod(0o600)

    variables = {"PGPASSFILE": str(secrets)} if named else {}
    done = replace(office, environ=variables).enrich("run", "job.yaml", api=api)

    assert (done.code, done.stderr) == (0, "")


@pytest.mark.parametrize("url", ["postgresql://enrich:secret@{}/enrich", "postgresql://{}/enrich?password=secret"])
def test_a_password_in_the_job_file_is_refused(office: Office, api: Api, postgres: Postgres, url: str) -> None:
    """It is not repeated either."""
    office.write_job(ledger=url.format(f"127.0.0.1:{postgres.port}"))

    done = office.command("run", "job.yaml", api=api)

    assert (done.code, "a URL holds no password" in done.stderr, "secret" in done.stderr) == (2, True, False)
    assert "job.yaml:" in done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PGPASSWORD": "wrong"}, ["password authentication failed", "hint: set PGPASSWORD"]),
        ({}, ["no password supplied", "hint: set PGPASSWORD"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "status"])
def test_who_is_not_let_in_is_told(
    api: Api, office: Office, command: str, variables: dict[str, str], words: list[str]
) -> None:
    """Exit 5 and what to do, whichever command; nothing was asked of the API that costs."""
    office.write_leads(people(1))

    done = replace(office, environ=variables).command(command, "job.yaml", api=api)

    assert done.code == Exit.REFUSED
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert api.audit()["accepted"] == 0


# Other places


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql://enrich@127.0.0.1:1/enrich", "refused"),
        ("postgresql://enrich@{}/nothing", 'database "nothing" does not exist'),
        ("postgresql://nobody@{}/enrich", "authentication failed"),
    ],
)
def test_a_server_that_is_not_there_is_told(api: Api, office: Office, postgres: Postgres, url: str, word: str) -> None:
    """With the place and a hint; who only looks does not wait for it."""
    office.write_leads(people(1))
    office.write_job(ledger=url.format(f"127.0.0.1:{postgres.port}"))

    done = office.command("status", "job.yaml", api=api)

    assert (done.code, word in done.stderr, "hint: " in done.stderr) == (Exit.REFUSED, True, True), done.stderr


def test_a_schema_of_somebody_else_is_left_alone(api: Api, office: Office, postgres: Postgres) -> None:
    """What has tables that are not ours is no ledger, and none is made of it."""
    schema = postgres.url().rpartition("=")[2]
    with closing(postgres.connect()) as db:
        db.execute(f"CREATE SCHEMA {schema}")
        db.execute(f"CREATE TABLE {schema}.theirs AS SELECT 1 AS number")
        office.write_leads(people(1))
        office.write_job(ledger=postgres.url(schema))

        done = office.command("run", "job.yaml", api=api)

        assert (done.code, "this schema is no ledger of enrich" in done.stderr) == (Exit.REFUSED, True), done.stderr
        tables = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (schema,)).fetchall()
        assert tables == [("theirs",)]


@pytest.fixture
def guest(postgres: Postgres) -> Iterator[str]:
    """Make a role that may log in, with the password `guest`, and make nothing."""
    role = f"guest_{postgres.url().rpartition('=')[2]}"
    with closing(postgres.connect("postgres")) as db:
        db.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'guest'")
        yield role
        db.execute(f"DROP OWNED BY {role} CASCADE")
        db.execute(f"DROP ROLE {role}")


def test_a_schema_that_was_made_for_us_is_taken(api: Api, office: Office, postgres: Postgres, guest: str) -> None:
    """Whoever may not make schemas gets an empty one from whoever may, and is told so without."""
    schema = postgres.url().rpartition("=")[2]
    office.write_leads(people(1))
    office.write_job(ledger=postgres.url(schema, guest))
    refused = office.command("run", "job.yaml", api=api, PGPASSWORD="guest")
    with closing(postgres.connect("postgres")) as db:
        db.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {guest}")
    taken = office.command("run", "job.yaml", api=api, PGPASSWORD="guest")

    assert (refused.code, "permission denied" in refused.stderr) == (Exit.REFUSED, True), refused.stderr
    assert "hint: grant CREATE on the database" in refused.stderr
    assert (taken.code, taken.stderr) == (0, "")


@pytest.mark.parametrize(("version", "word"), [(99, "newer version"), (0, "older version")])
def test_a_ledger_of_another_version_is_told(office: Office, version: int, word: str) -> None:
    """Whoever only looks neither reads what it cannot know nor changes it."""
    Ledger(office.place).close()
    office.sql("UPDATE ledger SET version = ?", version)

    done = office.command("report", "job.yaml")

    assert (done.code, word in done.stderr) == (Exit.REFUSED, True), done.stderr
    assert office.sql("SELECT version FROM ledger") == [(version,)]


def test_an_older_ledger_is_brought_up_once(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next who writes; several at once take turns, and all of them find it whole."""
    Ledger(office.place).close()
    step = "CREATE TABLE remarks (id BIGINT PRIMARY KEY);\n\nINSERT INTO remarks VALUES (1)"
    monkeypatch.setattr(schema, "POSTGRES_MIGRATIONS", [*schema.POSTGRES_MIGRATIONS, step])

    with ThreadPoolExecutor() as several:
        for ledger in several.map(lambda _: Ledger(office.place), range(4)):
            ledger.close()

    assert office.sql("SELECT version FROM ledger") == [(len(schema.POSTGRES_MIGRATIONS),)]
    assert office.sql("SELECT id FROM remarks") == [(1,)]


def test_a_step_that_fails_leaves_the_ledger_as_it_was(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps to the newest version are one transaction."""
    Ledger(office.place).close()
    version = office.sql("SELECT version FROM ledger")
    steps = ["CREATE TABLE remarks (id BIGINT PRIMARY KEY)", "INSERT INTO remarks VALUES (1);\n\nSELECT 1 / 0"]
    with monkeypatch.context() as newer:
        newer.setattr(schema, "POSTGRES_MIGRATIONS", [*schema.POSTGRES_MIGRATIONS, *steps])
        with pytest.raises(Refused, match="division by zero"):
            Ledger(office.place)

    assert office.sql("SELECT version FROM ledger") == version
    assert office.sql("SELECT to_regclass('remarks')") == [(None,)]
    Ledger(office.place).close()


def test_the_sandbox_has_a_schema_of_its_own(office: Office, postgres: Postgres) -> None:
    """What play money bought lies beside the real thing, and is found again."""
    office.write_leads(people(2))

    first = office.command("run", "job.yaml", "--sandbox", "--json")
    second = office.command("run", "job.yaml", "--sandbox", "--json")

    assert (first.receipt["submitted"], second.receipt["submitted"], second.receipt["reused"]) == (2, 0, 2)
    name = str(office.server).rpartition("=")[2]
    with closing(postgres.connect()) as db:
        rows = db.execute("SELECT nspname FROM pg_namespace WHERE starts_with(nspname, %s)", (name,)).fetchall()
    assert rows == [(f"{name}_sandbox",)]


def test_the_environment_names_the_ledger(api: Api, office: Office) -> None:
    """`ENRICH_LEDGER` instead of the job file's: the same job on a laptop and in a cluster."""
    url = str(office.server)
    plain = Office(office.folder, environ=office.environ)
    plain.write_job()
    plain.write_leads(people(2))

    done = plain.command("run", "job.yaml", "--json", api=api, ENRICH_LEDGER=url)

    assert (done.code, done.receipt["submitted"]) == (0, 2)
    assert not plain.ledger_path.exists()
    assert office.sql("SELECT count(*) FROM requests") == [(2,)]


# One at a time


def test_a_second_run_is_exit_11_and_may_wait(tmp_path: Path, office: Office) -> None:
    """One execution at a time holds the ledger, wherever the second is started."""
    office.write_leads(people(20))
    with serving(tmp_path / "api.db", latency="fixed(0.5)") as api, hold(office.place, 0):
        assert is_held(office.place)
        assert office.command("run", "job.yaml", api=api).code == Exit.LOCKED
        assert office.command("run", "job.yaml", "--if-locked", "skip", api=api).code == Exit.OK
    assert not is_held(office.place)


def test_a_server_may_take_a_moment_to_notice_a_kill(office: Office) -> None:
    """Who starts a killed run again at once is not turned away by the run that is no more."""
    dead = hold(office.place, 0)
    dead.__enter__()
    noticed = threading.Timer(0.7, dead.__exit__, (None, None, None))
    noticed.start()
    with hold(office.place, 0):
        pass
    noticed.join()


@pytest.mark.long
def test_the_lock_of_a_killed_run_is_free(tmp_path: Path, office: Office) -> None:
    """It dies with its connection; the next run finds what was on the wire in doubt and buys nothing twice."""
    office.write_job(ledger=f"{office.server}&lease=1")
    office.write_leads(people(60))
    with serving(tmp_path / "api.db", latency="uniform(0.2,0.6)") as api:
        process = office.start("run", "job.yaml", api=api)
        until(lambda: api.audit()["requests"].get("run", 0) >= 20)
        kill(process)
        done = office.enrich("run", "job.yaml", "--json", api=api)
        audit = api.audit()

    assert done.code in {Exit.OK, Exit.IN_DOUBT}, done.stderr
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    assert check(office.place).problems == []
