"""The base of most tests: the sandbox over real HTTP, a folder with a job and leads, the program as a process."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest
from msgspec.structs import replace
from pydantic import SecretStr

from enrich.cli import run_command
from enrich.databar.clock import SystemClock
from enrich.databar.environment import ApiAccess
from enrich.files.writer import temporary_path
from enrich.job.job import load_job
from enrich.job.locations import LedgerLocation, parse_ledger_location
from enrich.job.target import TargetKind
from enrich.ledger import transitions
from enrich.ledger.database import Database, ledger_exists
from enrich.ledger.lock import lock_ledger, open_for_run
from enrich.run.context import RunEnvironment, RunOptions
from enrich.run.pipeline import run
from enrich.run.progress import Progress
from enrich.run.run_state import Timeouts
from enrich.run.summary import RunSummary
from enrich.sandbox import SandboxSettings
from enrich.sandbox.server import serve_in_thread
from tests.support.ledger import run_sql
from tests.support.program import ProgramStart
from tests.support.short_waits import TIMEOUTS, short_waits

#: An API that answers immediately and never fails; most tests use it.
INSTANT_API = SandboxSettings(latency="fixed(0)", failure_rate=0.0, miss_kinds=("null",))
#: Short limits for what tests wait for, long ones for answers that come: a busy machine is slow.
SHORT_TIMEOUTS = Timeouts(
    startup_s=20,
    outage_s=20,
    drain_posts_s=1.0,
    ready_results_s=0.3,
    no_data_s=0.3,
    young_task_s=0.5,
    post_s=20,
    get_s=20,
)
#: For an API that is unreachable at the start.
SHORT_STARTUP_TIMEOUT = replace(SHORT_TIMEOUTS, startup_s=0.5)
#: For an API that fails permanently during the run.
SHORT_OUTAGE_TIMEOUT = replace(SHORT_TIMEOUTS, outage_s=1.0)
#: For POSTs that are never answered.
SHORT_POST_TIMEOUT = replace(SHORT_TIMEOUTS, post_s=2.0)


JOB = """\
version: 1
input: leads.csv
output: out.csv
waterfall: email_getter
params:
  first_name: First Name
  last_name: Last Name
  company: {column: [Website, Email], transform: [domain]}
columns:
  work_email: email
limits: {requests_per_second: 1000}
"""
#: The same job as one step.
STEP_JOB = """\
version: 1
input: leads.csv
output: out.csv
steps:
  - name: email
    waterfall: email_getter
    params:
      first_name: First Name
      last_name: Last Name
      company: {column: [Website, Email], transform: [domain]}
    columns: {work_email: email}
"""
#: The same leads with an enrichment, which is sent the first name and returns it.
ENRICHMENT_JOB = """\
version: 1
input: leads.csv
output: out.csv
enrichment: 80
params: {phone: First Name}
columns: {work_email: phone}
limits: {requests_per_second: 1000}
"""
#: The jobs by the kind of their target.
JOBS = {TargetKind.WATERFALL: JOB, TargetKind.ENRICHMENT: ENRICHMENT_JOB}
HEADER = ["First Name", "Last Name", "Website", "Email", "Note"]


@dataclass(frozen=True)
class SandboxApi:
    """A running sandbox and its controls."""

    base_url: str
    api_key: str

    @property
    def environ(self) -> dict[str, str]:
        """The variables that point the program to it."""
        return {"DATABAR_BASE_URL": self.base_url, "DATABAR_API_KEY": self.api_key}

    @property
    def access(self) -> ApiAccess:
        """The same as an object."""
        return ApiAccess(self.base_url, SecretStr(self.api_key))

    def _control(self, method: str, path: str, **body: Any) -> Any:
        with closing(HTTPConnection(urlsplit(self.base_url).netloc, timeout=60)) as http:
            http.request(method, path, json.dumps(body) if body else None, {"content-type": "application/json"})
            answer = http.getresponse()
            assert answer.status == HTTPStatus.OK, answer.read()
            return json.load(answer)

    def audit(self) -> dict[str, Any]:
        """Return what was accepted, charged and paid twice."""
        audit: dict[str, Any] = self._control("GET", "/__audit")
        return audit

    def advance(self, seconds: float) -> None:
        """Move the API's clock forward."""
        self._control("POST", "/__advance", seconds=seconds)

    def inject_fault(self, name: str, count: int = 1, scope: str | None = None, **params: Any) -> None:
        """Inject a fault into the next `count` requests of a scope."""
        body: dict[str, Any] = {"name": name, "next": count, "params": params}
        self._control("POST", "/__faults", **body, **({"scope": scope} if scope else {}))

    def top_up(self, credits_: float) -> None:
        """Add credits to the account."""
        self._control("POST", "/__topup", credits=credits_)

    def set_prices(self, prices: dict[int, float]) -> None:
        """Set prices of providers or verifiers."""
        self._control("POST", "/__prices", prices=prices)

    def clear_faults(self) -> None:
        """Stop all faults."""
        self._control("POST", "/__faults", clear=True)


@contextmanager
def serve_api(
    state: Path, settings: SandboxSettings = INSTANT_API, port: int = 0, **changes: Any
) -> Iterator[SandboxApi]:
    """Serve the sandbox in this process; `changes` are settings."""
    with serve_in_thread(state, dataclasses.replace(settings, **changes), port) as server:
        yield SandboxApi(server.base_url, server.api_key)


_BACKENDS = ("file", pytest.param("server", marks=pytest.mark.long))
#: For a test that runs with a SQLite file, and among the long tests with PostgreSQL. Each SQL statement has one, and so
#: have kills, locks, erasing, and commands during a run. What touches no database runs with a file only.
BOTH_BACKENDS = pytest.mark.parametrize("backend", _BACKENDS)


@pytest.fixture(params=_BACKENDS)
def both_backends(request: pytest.FixtureRequest) -> str:
    """Run each test of a module with both, where the module has it as its `backend`."""
    return str(request.param)


@dataclass(frozen=True)
class Workspace:
    """A folder with a job and its leads; the job file names the ledger only when it is on a server."""

    folder: Path
    server_url: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def job_file(self) -> Path:
        """The job file."""
        return self.folder / "job.yaml"

    @property
    def ledger_path(self) -> Path:
        """The path of the job's ledger when it is a file."""
        return self.folder / ".enrich" / "job.db"

    @property
    def part_path(self) -> Path:
        """The path of the temporary file of the output."""
        return temporary_path(self.folder / "out.csv", load_job(self.job_file).temporary_name)

    @property
    def ledger_location(self) -> LedgerLocation:
        """The location of the job's ledger, file or server."""
        return parse_ledger_location(self.folder, self.server_url or self.ledger_path, self.ledger_path.parent)

    def sql(self, sql: str, *values: object) -> list[Any]:
        """Run SQL on the ledger and return the rows."""
        return run_sql(self.ledger_location, sql, *values)

    def write_job(self, text: str = JOB, **replaced: str) -> Path:
        """Write the job file; `replaced` maps a key to its new value, on one line (or a new key at the end)."""
        lines = text.splitlines()
        for key, value in replaced.items():
            at = next((number for number, line in enumerate(lines) if line.startswith(f"{key}:")), len(lines))
            end = at + 1
            while end < len(lines) and lines[end].startswith(" "):
                end += 1
            lines[at:end] = [f"{key}: {value}"]
        if self.server_url and not any(line.startswith("ledger:") for line in lines):
            lines.append(f"ledger: {self.server_url}")
        self.job_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self.job_file

    def write_leads(
        self, rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER, name: str = "leads.csv"
    ) -> Path:
        """Write the input."""
        path = self.folder / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        return path

    def read_output(self, name: str = "out.csv") -> list[dict[str, str]]:
        """Read the output."""
        with (self.folder / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def open_ledger(self) -> Database:
        """Open the ledger read-only."""
        return Database(self.ledger_location, read_only=True)

    def run_subprocess(
        self,
        *arguments: str,
        api: SandboxApi | None = None,
        stdin: int = subprocess.DEVNULL,
        max_file_bytes: int | None = None,
        **environ: str,
    ) -> ProgramResult:
        """Run the program to its end as cron does, with a nearly empty environment.

        With `max_file_bytes`, no file grows beyond that size, as on a full disk.
        """
        start = ProgramStart(
            arguments, str(self.folder), self.environment(api) | environ, max_file_bytes=max_file_bytes
        )
        with start.start(stdin) as process:
            try:
                out, err = process.communicate(timeout=100)
            finally:
                process.kill()
        return ProgramResult(process.returncode, out, err)

    def run_in_process(self, *arguments: str, api: SandboxApi | None = None, **environ: str) -> ProgramResult:
        """Run the program in this process: starts faster, and ignores signals."""
        out, err = io.StringIO(), io.StringIO()
        with (
            short_waits(),
            chdir(self.folder),
            patch.dict(os.environ, self.environment(api) | environ, clear=True),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = run_command(arguments)
        return ProgramResult(int(code), out.getvalue(), err.getvalue())

    def start_subprocess(
        self,
        *arguments: str,
        api: SandboxApi | None = None,
        ignoring: Iterable[signal.Signals] = (),
        group: bool = False,
        clock: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        terminal: int | None = None,
        prelude: str = "",
        **environ: str,
    ) -> subprocess.Popen[str]:
        """Start the program, `ignoring` signals as under `nohup`; `group`: in a process group. The caller ends it.

        `clock`: file with the offset of its clock in seconds. `terminal`: descriptor of all three streams.
        `prelude`: code that runs before the program.
        """
        return ProgramStart(
            arguments,
            str(self.folder),
            self.environment(api) | environ,
            ignored_signals=tuple(ignoring),
            new_group=group,
            clock=None if clock is None else str(clock),
            prelude=prelude,
        ).start(*((stdin,) if terminal is None else (terminal, terminal, terminal)))

    def run_job(
        self, api: SandboxApi, options: RunOptions | None = None, timing: Timeouts = TIMEOUTS, **around: Any
    ) -> RunSummary:
        """Run the job in this process with any timeouts."""
        job = load_job(self.job_file)
        with short_waits(), lock_ledger(job.ledger, 0), open_for_run(job.ledger) as (ledger, lease):
            if lease is not None:
                around = {"clock": lease, "lease_valid": lease.is_valid} | around
            environment = RunEnvironment(timeouts=timing, **around)
            return run(job, api.access, ledger, options or RunOptions(), environment)

    def open_task_count(self) -> int:
        """Count the tasks without an answer."""
        if not ledger_exists(self.ledger_location):
            return 0
        with closing(self.open_ledger()) as ledger:
            return len(transitions.submitted_tasks(ledger))

    def environment(self, api: SandboxApi | None = None) -> dict[str, str]:
        """Return the complete environment, as under cron."""
        return {"PATH": os.defpath, "HOME": str(self.folder), **self.environ, **(api.environ if api else {})}

    def submit_without_collecting(self, api: SandboxApi, count: int | None = None) -> None:
        """Submit all requests, or the `count` new ones, to a slow API; end the run before any answer arrives."""
        clock = JumpingClock()

        def end_when_submitted(progress: Progress) -> None:
            if progress.total and progress.submitted >= (progress.total if count is None else count):
                clock.jumped_s = 3600.0

        summary = self.run_job(api, RunOptions(max_time_s=600.0), clock=clock, on_progress=end_when_submitted)
        expected = summary.requests if count is None else count
        assert (summary.exit_code, summary.submitted, summary.pending) == (13, expected, summary.rows)


@dataclass(slots=True)
class JumpingClock(SystemClock):
    """A clock that can jump forward, so that the time of a run is over immediately."""

    jumped_s: float = 0.0

    def monotonic(self) -> float:
        """Return the seconds since some moment, plus the jump."""
        return SystemClock.monotonic(self) + self.jumped_s


@dataclass(frozen=True)
class ProgramResult:
    """The exit code and output of the program."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json_output(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        output: dict[str, Any] = json.loads(self.stdout)
        return output


def clock_ahead(seconds: float) -> SystemClock:
    """Return a clock that is ahead: moving the API's clock alone makes no answer old."""
    clock = SystemClock()
    clock._boot_ms += int(seconds * 1000)
    return clock


def lead_name(params: Mapping[str, str]) -> str:
    """Return the first name of the lead with these params, in either job."""
    return params.get("first_name") or params["phone"]


def make_leads(count: int, start: int = 0) -> list[list[str]]:
    """Make leads that all differ and are all valid."""
    return [
        [f"First{number}", f"Last{number}", f"https://www.company{number}.example/about", "", f"note {number}"]
        for number in range(start, start + count)
    ]


def read_terminal(terminal: int, up_to: bytes | None = None) -> bytes:
    """Read from a pseudo-terminal until `up_to` appears or the other side is closed."""
    shown = b""
    with suppress(OSError):  # the other side is closed
        while (up_to is None or up_to not in shown) and (more := os.read(terminal, 65536)):
            shown += more
    return shown


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until a condition holds. It is checked less often the longer that takes, as many conditions are costly."""
    begun = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - begun
        if waited_s > timeout_s:
            raise AssertionError(f"the condition did not hold within {timeout_s:g} s")
        time.sleep(min(0.05, 0.005 + waited_s / 20))


def kill_process(process: subprocess.Popen[str]) -> None:
    """Kill a process with SIGKILL, as a power cut would."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
