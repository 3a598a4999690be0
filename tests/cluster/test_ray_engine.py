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

from enrich.run.summary import JSON_KEYS, RunSummary
from tests.end_to_end.test_steps import HEADER as STEPS_HEADER
from tests.end_to_end.test_steps import SHORT_JOB as SHORT_STEPS
from tests.end_to_end.test_steps import credits_of, make_people
from tests.support.cluster_torture import ON_RAY, worker_pids
from tests.support.postgres import PostgresServer
from tests.support.ray_head import RayHead
from tests.support.workspace import SandboxApi, Workspace, kill_process, make_leads, serve_api, wait_until

needs_ray = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`"),
]
RUN = ("run", "job.yaml", "--json")
TWO = (*ON_RAY, "2")
#: Rows in an order of their own are enrolled in one process: most tests here are about the workers.
ORDER = "First Name"

#: Ray's own messages and progress bars.
RAY_MESSAGE = re.compile(r"\bray(let)?\b|Dataset|MapBatches|ReadLeads", re.IGNORECASE)


@pytest.fixture
def postgres_workspace(tmp_path: Path, postgres: PostgresServer) -> Workspace:
    """Return a workspace whose ledger is on the server."""
    folder = tmp_path / "far"
    folder.mkdir()
    made = Workspace(folder, f"{postgres.ledger_url()}&lease=2", postgres.environ)
    made.write_job(limits="{requests_per_second: 100}", order_by=ORDER)
    return made


# Refused uses


def test_ray_needs_server_ledger(api: SandboxApi, workspace: Workspace) -> None:
    """Ray without a server ledger is refused with file, line, key and remedy."""
    workspace.write_job(ledger="leads.db")
    workspace.write_leads(make_leads(2))
    result = workspace.run_in_process(*RUN, "--engine", "ray", api=api)

    assert result.exit_code == 2
    line = workspace.job_file.read_text(encoding="utf-8").splitlines().index("ledger: leads.db") + 1
    assert f"job.yaml:{line}: ledger: --engine ray needs a ledger in PostgreSQL" in result.stderr
    assert "hint: set `ledger: postgresql://host/database`" in result.stderr


@pytest.mark.long
def test_missing_cluster_extra(api: SandboxApi, postgres_workspace: Workspace) -> None:
    """Without the `cluster` extra, the error shows how to install it."""
    postgres_workspace.write_leads(make_leads(2))
    with patch("enrich.commands.run.find_spec", return_value=None):
        result = postgres_workspace.run_in_process(*RUN, "--engine", "ray", api=api)

    assert result.exit_code == 2
    assert "hint: pip install 'FILE[cluster]'" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2"], "No such option"),
        (["--workers", "2"], "need --engine ray"),
        (["--address", "127.0.0.1:6379"], "need --engine ray"),
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


@pytest.mark.long
def test_stdin_input_is_refused(api: SandboxApi, postgres_workspace: Workspace) -> None:
    """Input from stdin is refused: other machines of the cluster can't read it."""
    result = postgres_workspace.run_in_process(
        *RUN, "--input", "-", "--engine", "ray", "--address", "10.0.0.5:6379", api=api
    )

    assert result.exit_code == 2
    assert (
        "with --address, the input must be a file that all machines can read, not a pipe or a download" in result.stderr
    )


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


def accepted_count(api: SandboxApi) -> int:
    """Return how many runs the API has accepted."""
    return int(api.audit()["accepted"])


def child_processes(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the id and the command line of each child of any thread of a process."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text(encoding="ascii").split():
            yield int(child), Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")


def process_exists(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def running_actors(
    workspace: Workspace, api: SandboxApi, head: RayHead | None = None, *, enough: int = 30, group: bool = False
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a run and wait until its two actors have bought `enough` rows; kill the run at the end.

    It connects to the cluster of `head`. None: it starts one. The first POSTs are slow, so that few workers cannot
    do all the work before the others have started.
    """
    api.inject_fault("slow", 10_000, "post", seconds=3)
    address = () if head is None else ("--address", head.address)
    # Ray's processes would get little time on a busy machine.
    process = workspace.start_subprocess(*TWO, *address, api=api, group=group, RAY_worker_niceness="0")
    root = process.pid if head is None else head.pid
    try:
        wait_until(lambda: len(list(worker_pids(root))) == 2 and accepted_count(api) >= enough, 120)
        api.clear_faults()
        yield process, list(worker_pids(root))
    finally:
        if process.poll() is None:
            kill_process(process)
        if head is not None:
            wait_until(lambda: not list(worker_pids(head.pid)), 40)


def wait_for_summary(process: subprocess.Popen[str]) -> RunSummary:
    """Wait for the end of a run and return its summary, the only text on stdout."""
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err
    assert not RAY_MESSAGE.search(err)
    values = json.loads(out)
    names = {key: name for name, key in JSON_KEYS.items()}
    return RunSummary(**{names.get(key, key): value for key, value in values.items()})


def assert_consistent_with_audit(api: SandboxApi, leads: int, summary: RunSummary) -> None:
    """Compare a run summary with the API's audit."""
    audit = api.audit()
    assert audit["paid_twice"] == audit["accepted_more_than_once"] == 0
    assert summary.pending == 0
    assert leads - (summary.in_doubt or 0) <= audit["accepted"] <= leads


class TestOnRay:
    """Runs on Ray."""

    pytestmark = needs_ray

    def test_ray_matches_single_process(
        self,
        tmp_path: Path,
        postgres_workspace: Workspace,
        postgres: PostgresServer,
        ray_head: RayHead,
    ) -> None:
        """Ray gives the same rows and answers, here in bulk and as a dataset; rate, canary, limit hold for all workers.

        Other tests send single requests: the bill of `test_steps_on_ray` is that of the file.
        """
        canary, limits = "{rows: 5, min_hit_rate: 0.01}", "{requests_per_second: 50}"
        postgres_workspace.write_job(limits=limits, output="out/leads/", canary=canary, dispatch="{bulk: 7}")
        postgres_workspace.write_leads(make_leads(100))
        outcomes = []
        for words in (RUN, (*TWO, "--address", ray_head.address)):
            more = ("--limit", "80", "--ledger", f"{postgres.ledger_url()}&lease=2", "--new-ledger")
            with serve_api(tmp_path / f"{len(words)}.db", failure_rate=0.1, rate=55.0, burst=15) as api:
                result = wait_for_summary(postgres_workspace.start_subprocess(*words, *more, api=api))
                assert api.audit()["paid_twice"] == 0
            rows = pl.read_parquet(postgres_workspace.folder / "out" / "leads" / "*.parquet").sort("enrich_index")
            outcomes.append((result.exit_code, result.credits_spent, rows.drop("enrich_task_id", "enrich_at").rows()))
            assert (result.pending, result.rate_limited) == (20, 0)

        assert outcomes[0] == outcomes[1]

    def test_killed_actor_is_replaced(self, tmp_path: Path, postgres_workspace: Workspace, ray_head: RayHead) -> None:
        """A killed actor is replaced, and its tasks are taken over; no file of Ray contains the key.

        The cap holds: the actor's reservation stays, and others wait for credits to come free.
        """
        postgres_workspace.write_job(limits="{requests_per_second: 60, max_credits: 15}", order_by=ORDER)
        postgres_workspace.write_leads(make_leads(200))
        with (
            serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api,
            running_actors(postgres_workspace, api, ray_head, enough=5) as (process, workers),
        ):
            os.kill(workers[0], signal.SIGKILL)
            files = [each for each in ray_head.folder.glob("session_*/**/*") if each.is_file()]
            assert files
            assert not any(api.api_key.encode() in each.read_bytes() for each in files)
            summary = wait_for_summary(process)
            audit = api.audit()
        (max_reserved,) = postgres_workspace.sql("SELECT max(reserved) FROM attempts")[0]
        unknown = summary.in_doubt or 0

        assert (summary.exit_code, audit["paid_twice"], audit["accepted_more_than_once"]) == (12, 0, 0)
        assert any("a worker process of the cluster ended unexpectedly" in note for note in summary.notes)
        assert 15 - (1 + unknown) * max_reserved / 1e6 < audit["credits_charged"] <= 15

    def test_suspended_actors(self, tmp_path: Path, postgres_workspace: Workspace, ray_head: RayHead) -> None:
        """Others take over the tasks of an actor suspended past its lease; it overwrites nothing and resumes later.

        The run ends without an actor that never resumes.
        """
        postgres_workspace.write_job(limits="{requests_per_second: 40}", order_by=ORDER)
        postgres_workspace.write_leads(make_leads(300))
        with (
            serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api,
            running_actors(postgres_workspace, api, ray_head) as (process, workers),
        ):
            leases = ("SELECT count(*) FROM leases WHERE name LIKE ?", f"% {workers[0]}")
            wait_until(lambda: postgres_workspace.sql(*leases) == [(1,)])
            os.kill(workers[0], signal.SIGSTOP)
            wait_until(lambda: postgres_workspace.sql(*leases) == [(0,)])
            os.kill(workers[0], signal.SIGCONT)
            wait_until(lambda: postgres_workspace.sql(*leases) == [(1,)])
            os.kill(workers[1], signal.SIGSTOP)
            summary = wait_for_summary(process)
            assert_consistent_with_audit(api, 300, summary)
            assert not process_exists(workers[1])

        assert summary.exit_code == (14 if summary.in_doubt else 0)
        assert [note for note in summary.notes if "lost" in note] == [
            "workers were lost (it stopped responding). Other workers took over their tasks"
        ]

    def test_actors_exit_when_driver_is_killed(
        self, tmp_path: Path, postgres_workspace: Workspace, ray_head: RayHead
    ) -> None:
        """When the driver is killed, actors record their POSTs in flight; the next run resumes on the same cluster."""
        postgres_workspace.write_leads(make_leads(300))
        with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
            with running_actors(postgres_workspace, api, ray_head) as (process, _):
                kill_process(process)
            wait_until(lambda: postgres_workspace.sql("SELECT count(*) FROM leases WHERE seconds > 0") == [(0,)], 40)
            assert postgres_workspace.sql(
                "SELECT count(*) FROM attempts WHERE state IN ('submitting', 'in_doubt')"
            ) == [(0,)]
            again = postgres_workspace.start_subprocess(*TWO, "--address", ray_head.address, api=api)
            summary = wait_for_summary(again)
            assert not list(worker_pids(ray_head.pid))
            assert_consistent_with_audit(api, 300, summary)

        assert (summary.exit_code, summary.in_doubt) == (0, 0)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
    def test_signals_stop_actors_cleanly(
        self, tmp_path: Path, postgres_workspace: Workspace, number: signal.Signals, request: pytest.FixtureRequest
    ) -> None:
        """On SIGTERM the actors record their POSTs in flight and nothing is in doubt; Ray alone would end at once.

        Ctrl-C reaches every process of the terminal, Ray's own, too: nothing is lost, but a POST in flight may be in
        doubt.
        """
        postgres_workspace.write_leads(make_leads(150))
        code = 128 + number
        head = None if number == signal.SIGINT else request.getfixturevalue("ray_head")
        with (
            serve_api(tmp_path / "api.db", latency="fixed(60)") as api,
            running_actors(postgres_workspace, api, head, group=True) as (process, workers),
        ):
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            summary = wait_for_summary(process)
            in_doubt = summary.in_doubt or 0
            assert 0 <= accepted_count(api) - postgres_workspace.open_task_count() <= in_doubt

        assert (process.returncode, summary.exit_code) == (code, code)
        assert in_doubt == 0 or number == signal.SIGINT
        assert not any(map(process_exists, workers))

    def test_local_cluster_that_loses_its_head(self, tmp_path: Path, postgres_workspace: Workspace) -> None:
        """A run whose local cluster loses its head process prints its summary, because Ray waits for it."""
        postgres_workspace.write_leads(make_leads(200))
        with serve_api(tmp_path / "api.db", latency="uniform(0.1,0.6)") as api:
            with running_actors(postgres_workspace, api) as (process, workers):
                environ = Path(f"/proc/{workers[0]}/environ").read_bytes().split(b"\0")
                heads = [pid for pid, title in child_processes(process.pid) if "gcs_server" in title]
                for pid in heads:
                    os.kill(pid, signal.SIGKILL)
                summary = wait_for_summary(process)
            assert_consistent_with_audit(api, 200, summary)

        assert heads
        assert b"RAY_gcs_rpc_server_reconnect_timeout_s=100000000" in environ  # or Ray ends the driver after a minute
        assert summary.exit_code == 0
        assert not any(map(process_exists, workers))


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray comes with the extra `cluster`")
def test_python_runs_on_ray(api: SandboxApi, postgres_workspace: Workspace, ray_head: RayHead) -> None:
    """`run_job` carries the work with Ray, also in a running event loop."""
    postgres_workspace.write_leads(make_leads(20))
    code = (
        "import asyncio, enrich\n"
        "async def notebook_cell():\n"
        f"    summary = enrich.run_job('job.yaml', engine='ray', workers=2, address='{ray_head.address}')\n"
        "    print('submitted', summary.submitted, summary.exit_code)\n"
        "asyncio.run(notebook_cell())\n"
    )
    environ = postgres_workspace.environment(api)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=postgres_workspace.folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert "submitted 20 0" in done.stdout, done.stderr


@pytest.mark.long
class TestStepsOnRay:
    """A job with steps on Ray: workers send and poll each step; the table of a step is read by the run itself."""

    pytestmark = needs_ray

    def test_steps_on_ray(self, postgres_workspace: Workspace, api: SandboxApi, ray_head: RayHead) -> None:
        """Workers send each step's requests, and the file's sum is the bill."""
        postgres_workspace.write_job(SHORT_STEPS)
        postgres_workspace.write_leads(make_people(40), STEPS_HEADER)
        result = postgres_workspace.run_subprocess(*TWO, "--address", ray_head.address, api=api)
        summary, audit = result.json_output, api.audit()
        assert result.exit_code in (0, 10), result.stderr
        assert summary["steps"][0]["submitted"] >= 40
        assert sum(step["submitted"] for step in summary["steps"]) == audit["accepted"]
        assert audit["paid_twice"] == 0
        assert credits_of(postgres_workspace.read_output()) == pytest.approx(audit["credits_charged"])
