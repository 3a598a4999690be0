"""`--engine ray`: its error messages, and runs whose three steps are done on Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import polars as pl
import pytest

from enrich.run.summary import RunSummary
from tests.support.cluster_torture import ON_RAY, worker_pids
from tests.support.postgres import PostgresServer
from tests.support.workspace import SandboxApi, Workspace, kill_process, make_leads, serve_api, wait_until

needs_ray = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
]
RUN = ("run", "job.yaml", "--json")
THREE = (*ON_RAY, "3")

#: Ray's own messages.
RAY_MESSAGE = re.compile(r"\bray(let)?\b", re.IGNORECASE)


@pytest.fixture
def postgres_workspace(tmp_path: Path, postgres: PostgresServer) -> Workspace:
    """Return a workspace whose ledger is on the server."""
    folder = tmp_path / "far"
    folder.mkdir()
    made = Workspace(folder, f"{postgres.ledger_url()}&lease=2", postgres.environ)
    made.write_job(limits="{requests_per_second: 100}")
    return made


# Refused uses


def test_ray_needs_server_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """Ray without a server ledger is refused with file, line, key and remedy."""
    workspace.write_job(ledger="leads.db")
    workspace.write_leads(make_leads(2))
    result = workspace.run_in_process(*RUN, "--engine", "ray", api=api)

    assert result.exit_code == 2
    line = workspace.job_file.read_text(encoding="utf-8").splitlines().index("ledger: leads.db") + 1
    assert f"job.yaml:{line}: ledger: --engine ray needs a ledger that all workers reach" in result.stderr
    assert "hint: keep it in PostgreSQL: `ledger: postgresql://host/database`" in result.stderr


@pytest.mark.long
def test_missing_cluster_extra(api: SandboxApi, postgres_workspace: Workspace) -> None:
    """Without the `cluster` extra, the error shows how to install it."""
    postgres_workspace.write_leads(make_leads(2))
    with patch("enrich.commands.run.find_spec", return_value=None):
        result = postgres_workspace.run_in_process(*RUN, "--engine", "ray", api=api)

    assert result.exit_code == 2
    assert "hint: pip install 'databar-enrich[cluster]'" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "No such option"),
        (["--workers", "2"], "are for --engine ray"),
        (["--address", "127.0.0.1:6379"], "are for --engine ray"),
        (["--engine", "ray", "--address", "somewhere"], "must be HOST:PORT"),
        (["--engine", "ray", "--address", "ray://127.0.0.1:10001"], "without `ray://`"),
    ],
)
def test_incompatible_options(options: list[str], message: str, api: SandboxApi, workspace: Workspace) -> None:
    """Options that can't be combined are usage errors before anything starts."""
    workspace.write_leads(make_leads(2))
    result = workspace.run_in_process(*RUN, *options, api=api)

    assert result.exit_code == 2
    assert message in result.stderr


def test_stdin_input_is_refused(api: SandboxApi, postgres_workspace: Workspace) -> None:
    """Input from stdin is refused: other machines of the cluster can't read it."""
    result = postgres_workspace.run_in_process(
        *RUN, "--input", "-", "--engine", "ray", "--address", "10.0.0.5:6379", api=api
    )

    assert result.exit_code == 2
    assert "what comes through a pipe is not seen by the machines at --address: put it into a file" in result.stderr


@pytest.mark.long
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`")
def test_unreachable_cluster_is_exit_4(api: SandboxApi, postgres_workspace: Workspace) -> None:
    """An unreachable cluster is exit 4: nothing was sent, and the next run resumes."""
    postgres_workspace.write_leads(make_leads(2))
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        result = postgres_workspace.run_in_process(
            *RUN, "--engine", "ray", "--address", f"127.0.0.1:{taken.getsockname()[1]}", api=api
        )

    assert result.exit_code == 4
    assert "the Ray cluster at 127.0.0.1" in result.stderr
    assert "can't be reached" in result.stderr
    assert accepted_count(api) == 0


# Runs on a real Ray cluster


@pytest.fixture
def cluster(postgres_workspace: Workspace) -> Iterator[tuple[str, int]]:
    """Start a Ray cluster that exists before and after the run; return its address and its process id."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    head = subprocess.Popen(
        [ray, *words, "--disable-usage-stats"],
        cwd=postgres_workspace.folder,
        env=postgres_workspace.environment() | {"RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        wait_until(lambda: is_listening(port), 40)
        yield f"127.0.0.1:{port}", head.pid
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def is_listening(port: int) -> bool:
    """Return whether a server listens on this port."""
    with closing(socket.socket()) as probe:
        return not probe.connect_ex(("127.0.0.1", port))


def accepted_count(api: SandboxApi) -> int:
    """Return how many runs the API has accepted."""
    return int(api.audit()["accepted"])


def process_exists(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def running_actors(
    workspace: Workspace, api: SandboxApi, *more: str, enough: int = 30, group: bool = False
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a run and wait until its three actors have bought `enough` rows; kill the run at the end."""
    process = workspace.start_subprocess(*THREE, *more, api=api, group=group)
    try:
        wait_until(lambda: accepted_count(api) >= enough and len(list(worker_pids(process.pid))) == 3, 120)
        yield process, list(worker_pids(process.pid))
    finally:
        kill_process(process) if process.poll() is None else None


def wait_for_summary(process: subprocess.Popen[str]) -> RunSummary:
    """Wait for the end of a run and return its summary, the only text on stdout."""
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err
    assert not RAY_MESSAGE.search(err)
    return RunSummary(**json.loads(out))


def assert_consistent_with_audit(api: SandboxApi, leads: int, summary: RunSummary) -> None:
    """Compare a run summary with the API's audit."""
    audit = api.audit()
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    assert summary.pending == 0
    assert leads - (summary.in_doubt or 0) <= audit["accepted"] <= leads


class TestOnRay:
    """Runs on Ray."""

    pytestmark = needs_ray

    @pytest.mark.parametrize("dispatch", ["{bulk: null}", "{bulk: 7}"])
    def test_ray_matches_single_process(
        self, tmp_path: Path, postgres_workspace: Workspace, postgres: PostgresServer, dispatch: str
    ) -> None:
        """Ray gives the same rows and answers, here as a dataset; rate, canary and limit apply to all workers."""
        canary, limits = "{rows: 5, min_hit_rate: 0.01}", "{requests_per_second: 50}"
        postgres_workspace.write_job(limits=limits, output="out/leads/", canary=canary, dispatch=dispatch)
        postgres_workspace.write_leads(make_leads(120))
        outcomes = []
        for words in (RUN, THREE):
            more = ("--limit", "100", "--ledger", f"{postgres.ledger_url()}&lease=2", "--new-ledger")
            with serve_api(tmp_path / f"{len(words)}.db", failure_rate=0.1, rate=55.0, burst=15) as api:
                result = wait_for_summary(postgres_workspace.start_subprocess(*words, *more, api=api))
                assert api.audit()["paid_twice"] == 0
            rows = pl.read_parquet(postgres_workspace.folder / "out" / "leads" / "*.parquet").sort("enrich_index")
            outcomes.append((result.exit_code, result.credits_spent, rows.drop("enrich_task_id", "enrich_at").rows()))
            assert (result.pending, result.rate_limited) == (20, 0)

        assert outcomes[0] == outcomes[1]

    def test_killed_actor_is_replaced(self, tmp_path: Path, postgres_workspace: Workspace) -> None:
        """A killed actor is replaced and its tasks are taken over; no file of Ray contains the key."""
        postgres_workspace.write_leads(make_leads(200))
        with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
            with running_actors(postgres_workspace, api) as (process, workers):
                files = [each for each in Path("/tmp/ray").glob("session_*/**/*") if each.is_file()]  # noqa: S108
                assert not any(api.api_key.encode() in each.read_bytes() for each in files)
                os.kill(workers[0], signal.SIGKILL)
                summary = wait_for_summary(process)
            assert_consistent_with_audit(api, 200, summary)

        assert summary.exit_code == (14 if summary.in_doubt else 0)
        assert any("an actor of the cluster died" in note for note in summary.notes)

    def test_cap_is_kept_when_actor_is_killed(self, tmp_path: Path, postgres_workspace: Workspace) -> None:
        """The cap holds when an actor is killed: its reservation stays, and others wait for credits to come free."""
        postgres_workspace.write_job(limits="{requests_per_second: 120, max_credits: 15}")
        postgres_workspace.write_leads(make_leads(200))
        with (
            serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api,
            running_actors(postgres_workspace, api, enough=5) as (process, workers),
        ):
            os.kill(workers[0], signal.SIGKILL)
            summary = wait_for_summary(process)
            audit = api.audit()
        (max_reserved,) = postgres_workspace.sql("SELECT max(reserved) FROM attempts")[0]
        unknown = summary.in_doubt or 0

        assert (summary.exit_code, audit["paid_twice"]) == (12, 0)
        assert 15 - (1 + unknown) * max_reserved / 1e6 < audit["credits_charged"] <= 15

    def test_suspended_actor_rejoins_after_its_lease(self, tmp_path: Path, postgres_workspace: Workspace) -> None:
        """Others take over the tasks of an actor suspended past its lease; it overwrites nothing and resumes later."""
        postgres_workspace.write_job(limits="{requests_per_second: 40}")
        postgres_workspace.write_leads(make_leads(300))
        with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
            with running_actors(postgres_workspace, api) as (process, workers):
                leases = ("SELECT count(*) FROM owners WHERE name LIKE ?", f"% {workers[0]}")
                wait_until(lambda: postgres_workspace.sql(*leases) == [(1,)])
                os.kill(workers[0], signal.SIGSTOP)
                wait_until(lambda: postgres_workspace.sql(*leases) == [(0,)])
                os.kill(workers[0], signal.SIGCONT)
                wait_until(lambda: postgres_workspace.sql(*leases) == [(1,)])
                summary = wait_for_summary(process)
            assert_consistent_with_audit(api, 300, summary)

        assert summary.exit_code == (14 if summary.in_doubt else 0)
        assert not any("lost" in note for note in summary.notes)

    def test_actor_that_never_resumes_is_given_up(self, tmp_path: Path, postgres_workspace: Workspace) -> None:
        """The run ends without an actor that never resumes."""
        postgres_workspace.write_leads(make_leads(200))
        with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
            with running_actors(postgres_workspace, api) as (process, workers):
                os.kill(workers[0], signal.SIGSTOP)
                summary = wait_for_summary(process)
            assert_consistent_with_audit(api, 200, summary)

        assert not process_exists(workers[0])
        assert any("said nothing any more" in note for note in summary.notes)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
    def test_signals_stop_actors_cleanly(
        self, tmp_path: Path, postgres_workspace: Workspace, number: signal.Signals
    ) -> None:
        """On SIGTERM the actors record their POSTs in flight and nothing is in doubt; Ray alone would end at once.

        Ctrl-C reaches every process of the terminal: nothing is lost, but a POST in flight may be in doubt.
        """
        postgres_workspace.write_leads(make_leads(150))
        code = 128 + number
        with serve_api(tmp_path / "api.db", latency="fixed(60)") as api:
            with running_actors(postgres_workspace, api, group=True) as (process, left):
                (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
                summary = wait_for_summary(process)
            in_doubt = summary.in_doubt or 0
            assert 0 <= accepted_count(api) - postgres_workspace.open_task_count() <= in_doubt

        assert (process.returncode, summary.exit_code) == (code, code)
        assert in_doubt == 0 or number == signal.SIGINT
        assert not any(map(process_exists, left))

    def test_actors_exit_when_driver_is_killed(
        self, tmp_path: Path, postgres_workspace: Workspace, cluster: tuple[str, int]
    ) -> None:
        """When the driver is killed, actors record their POSTs in flight; the next run resumes on the same cluster."""
        postgres_workspace.write_leads(make_leads(300))
        address, head = cluster
        words = (*THREE, "--address", address)
        with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
            process = postgres_workspace.start_subprocess(*words, api=api)
            wait_until(lambda: accepted_count(api) >= 30 and len(list(worker_pids(head))) == 3, 60)
            kill_process(process)
            wait_until(lambda: not list(worker_pids(head)), 40)
            wait_until(lambda: postgres_workspace.sql("SELECT count(*) FROM owners WHERE seconds > 0") == [(0,)], 40)
            assert postgres_workspace.sql(
                "SELECT count(*) FROM attempts WHERE state IN ('submitting', 'in_doubt')"
            ) == [(0,)]
            summary = wait_for_summary(postgres_workspace.start_subprocess(*words, api=api))
            assert not list(worker_pids(head))
            assert_consistent_with_audit(api, 300, summary)

        assert (summary.exit_code, summary.in_doubt) == (0, 0)
