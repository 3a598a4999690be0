"""The Python API: it runs, plans and checks jobs as the command line does, in scripts, event loops and threads."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import enrich
from enrich.ledger.lock import lock_ledger
from enrich.run.poll_schedule import PollSchedule
from enrich.run.run_state import Timeouts
from enrich.run.step_plan import StepsPlan
from tests.end_to_end.test_repeated_runs import set_default_providers
from tests.support.cases import first_quick, in_turn
from tests.support.program import ROOT
from tests.support.raw_server import ReceivedRequest, Reply, http_reply, serve_replies
from tests.support.workspace import SandboxApi, Workspace, make_leads, serve_api

#: The settings of a run that is never answered, so that only a stop ends it.
NEVER_ANSWERS = "fixed(100000)"


@pytest.fixture
def job_file(workspace: Workspace, api: SandboxApi, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of six leads, and the API of `api` in the environment."""
    for name, value in api.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PollSchedule, "FIRST_GUESS_S", 0.05)
    monkeypatch.setattr(PollSchedule, "MIN_DELAY_S", 0.05)
    workspace.write_leads(make_leads(6))
    return workspace.write_job()


@pytest.fixture
def slow_job(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job of six leads at an API that never answers."""
    with serve_api(tmp_path / "slow.db", latency=NEVER_ANSWERS) as api:
        for name, value in api.environ.items():
            monkeypatch.setenv(name, value)
        workspace.write_leads(make_leads(6))
        yield workspace.write_job()


@pytest.fixture(autouse=True)
def _default_sigint() -> Iterator[None]:
    """Tests in the background ignore SIGINT, as all programs there do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def kill_once(number: signal.Signals) -> Callable[[enrich.Progress], None]:
    """Return a callback that sends the signal to this process when all is submitted."""
    is_sent = False

    def on_progress(progress: enrich.Progress) -> None:
        nonlocal is_sent
        if progress.submitted == 6 and not is_sent:
            is_sent = True
            os.kill(os.getpid(), number)

    return on_progress


def set_when_submitted(event: asyncio.Event | threading.Event) -> Callable[[enrich.Progress], None]:
    """Return a callback that sets the event when all is submitted."""

    def on_progress(progress: enrich.Progress) -> None:
        if progress.submitted == 6:
            event.set()

    return on_progress


def test_importing_the_package_imports_nothing_else() -> None:
    """`import enrich` takes no time: neither polars nor HTTP nor the commands are imported before they are used."""
    code = "import sys; before = set(sys.modules); import enrich; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    imported = done.stdout.split()
    assert [name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names] == ["enrich"]


def test_all_public_names_exist() -> None:
    """Each public name can be imported; others cannot."""
    assert {name: getattr(enrich, name).__name__ for name in enrich.__all__} == {name: name for name in enrich.__all__}
    assert set(enrich.__all__) < set(dir(enrich))
    with pytest.raises(AttributeError, match="run_jobs"):
        enrich.run_jobs  # type: ignore[attr-defined]  # noqa: B018


def test_a_job_is_checked_planned_and_run(job_file: Path, workspace: Workspace, api: SandboxApi) -> None:
    """The results have the numbers of the command line, and a second run sends nothing."""
    checked = enrich.check_job(job_file, online=True)
    assert (checked.exit_code, checked.problems, checked.rows, checked.sendable_rows) == (0, [], 6, 6)
    plan = enrich.plan_job(job_file, limit=4)
    assert (plan.rows, plan.to_submit, api.audit()["accepted"]) == (6, 4, 0)
    assert plan.balance is not None
    assert plan.cost.maximum is not None
    assert 0 < plan.cost.maximum < plan.balance

    progress: list[enrich.Progress] = []
    summary = enrich.run_job(str(job_file), limit=4, on_progress=progress.append)
    assert (summary.exit_code, summary.submitted, summary.pending, summary.error) == (0, 4, 2, None)
    assert (progress[-1].done, progress[-1].total) == (4, 4)
    assert summary.output == str(workspace.folder / "out.csv")
    assert enrich.run_job(job_file).submitted == 2
    assert (enrich.run_job(job_file).submitted, api.audit()["accepted"]) == (0, 6)


@pytest.mark.usefixtures("job_file")
def test_paths_and_limits_replace_those_of_the_job(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the working directory, as on the command line."""
    workspace.write_leads(make_leads(2), name="other.csv")
    monkeypatch.chdir(workspace.folder)
    summary = enrich.run_job(
        "job.yaml",
        input="other.csv",
        output=Path("sub/out.jsonl"),
        ledger="other.db",
        max_credits=0,
        max_time="1h",
        log_file="run.log",
    )
    assert (summary.exit_code, summary.rows, summary.submitted) == (12, 2, 0)
    assert summary.error is not None
    assert (workspace.folder / "other.db").exists()
    assert summary.output == str(workspace.folder / "sub" / "out.jsonl")
    log = [json.loads(line) for line in (workspace.folder / "run.log").read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in log if line["event"] in ("start", "end")] == ["start", "end"]
    assert not workspace.ledger_path.exists()


def test_a_saved_plan_is_followed(job_file: Path, workspace: Workspace) -> None:
    """A run follows the plan that `plan_job` saved, and a plan has its own selection."""
    kept = workspace.folder / "plan.json"
    rows = workspace.folder / "rows.csv"
    assert enrich.plan_job(job_file, limit=3, save_to=kept, rows=rows).to_submit == 3
    assert rows.exists()
    with pytest.raises(enrich.JobError, match="has its own"):
        enrich.run_job(job_file, plan=kept, limit=1)
    assert enrich.run_job(job_file, plan=kept).submitted == 3


def test_a_plan_of_steps_has_its_amounts_in_credits(tmp_path: Path) -> None:
    """Balance, cap and prices of a job with steps are credits, as those of other plans are."""
    plan = enrich.plan_job(ROOT / "jobs" / "full_contact.yaml", sandbox=True, ledger=tmp_path / "ledger.db")
    assert (plan.balance, plan.max_credits, plan.cost.maximum) == (10_000, 300, 300)
    assert isinstance(plan, StepsPlan)
    assert [step.worst_price for step in plan.steps] == [step["worst_price"] for step in plan.as_json()["steps"]]


def test_a_plan_shows_the_price_of_new_providers(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `update_providers` a plan has the requests that a run with it would send."""
    assert enrich.run_job(job_file).submitted == 6
    set_default_providers(monkeypatch, 833, 113)
    assert enrich.plan_job(job_file).to_submit == 0
    assert enrich.plan_job(job_file, update_providers=True).to_submit == 6


@in_turn(
    ("settings", "message"),
    [
        ({"limit": -1}, "`limit` must be 0 or more"),
        ({"limit": 1.5}, "`limit` must be a valid integer"),
        ({"limit": "5"}, "`limit` must be a valid integer"),
        ({"sample": True}, "`sample` must be a valid integer"),
        ({"seed": None}, "`seed` must be a valid integer"),
        ({"max_credits": "5"}, "`max_credits` must be a valid number"),
        ({"max_time": []}, "`max_time` must be a valid number or a valid string"),
        ({"lock_timeout": "x"}, "`lock_timeout` must be a valid number"),
        ({"sandbox": "no"}, "`sandbox` must be a valid boolean"),
        ({"input": 5}, "`input` must be a valid string or an instance of PathLike"),
        ({"retry": 5}, "`retry` must be an instance of Collection"),
        ({"on_progress": 5}, "`on_progress` must be callable"),
        ({"sample": 0}, "`sample` must be 1 or more"),
        ({"max_credits": float("nan")}, "`max_credits` must be 0 or more"),
        ({"retry": "failed"}, "must be a list"),
        ({"retry": ["found"]}, "`found` must be one of"),
        ({"max_time": "soon"}, "`max_time`: a duration"),
        ({"max_time": -5}, "`max_time` must be 0 or more"),
        ({"max_time": float("nan")}, "`max_time` must be 0 or more"),
        ({"engine": "x"}, "`engine` must be 'ray'"),
        ({"workers": 2}, "need --engine ray"),
        ({"log_file": "s3://bucket/run.log"}, "`log_file`: must be a file on this machine"),
        ({"log_file": ""}, "`log_file`: .* it is empty"),
        ({"log_file": "."}, "`log_file`: .* is a folder"),
        ({"plan": "a\0b"}, "`plan`: .* it has a null character"),
        ({"retry": ["in_doubt"], "accept_in_doubt": True}, "choose one"),
    ],
)
def test_unusable_settings_are_refused(
    job_file: Path, api: SandboxApi, settings: dict[str, object], message: str
) -> None:
    """A setting that makes no sense is a JobError, and nothing is sent; a misspelled one is a TypeError."""
    with pytest.raises(enrich.JobError, match=message):
        enrich.run_job(job_file, **settings)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="limt"):
        enrich.run_job(job_file, limt=10)  # type: ignore[call-arg]
    assert api.audit()["accepted"] == 0
    assert not (job_file.parent / ".enrich").exists()


def test_settings_of_all_functions_are_checked(job_file: Path) -> None:
    """Each function checks the types of its settings."""
    with pytest.raises(enrich.JobError, match="`limit` must be a valid integer"):
        asyncio.run(enrich.run_job_async(job_file, limit="5"))  # type: ignore[arg-type]
    with pytest.raises(enrich.JobError, match="`rows` must be a valid string"):
        enrich.plan_job(job_file, rows=1)  # type: ignore[arg-type]
    with pytest.raises(enrich.JobError, match="`online` must be a valid boolean"):
        enrich.check_job(job_file, online="no")  # type: ignore[arg-type]
    with pytest.raises(enrich.JobError, match="`job_file` must be a valid string"):
        enrich.check_job(None)  # type: ignore[arg-type]
    for name in ("", "-", ".", "https://h.example/x"):
        with pytest.raises(enrich.JobError, match="`rows`: "):
            enrich.plan_job(job_file, rows=name)
        with pytest.raises(enrich.JobError, match="`job_file`: "):
            enrich.check_job(name)


@pytest.mark.parametrize("first", first_quick(1, [True, False]))
@in_turn(
    ("status", "error"),
    [
        (401, enrich.ApiKeyRejected),
        (403, enrich.ApiKeyRejected),
        (404, enrich.JobError),
        (400, enrich.JobError),
        (422, enrich.JobError),
        (302, enrich.ApiUnreachable),
        (402, enrich.ApiUnreachable),
        (406, enrich.ApiUnreachable),
        (429, enrich.ApiUnreachable),
        (500, enrich.ApiUnreachable),
    ],
)
def test_refusals_of_the_api_are_public_exceptions(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, status: int, error: type[enrich.EnrichError], *, first: bool
) -> None:
    """Each response that refuses a run is one of the documented exceptions, with its exit code."""
    # What is repeated for a while ends soon. Anything else has the time that it takes on a busy machine.
    startup_s = 0.1 if error is enrich.ApiUnreachable else 60.0
    monkeypatch.setattr("enrich.run.run_state.Timeouts", partial(Timeouts, startup_s=startup_s))

    def answer(request: ReceivedRequest) -> Reply:
        is_account = not first and "/user/" in request.line
        return http_reply(200, {"workspace": "w", "balance": 5}) if is_account else http_reply(status, {"detail": "no"})

    with serve_replies(answer) as server:
        monkeypatch.setenv("DATABAR_BASE_URL", server.base_url)
        calls: list[Callable[[], object]] = [lambda: enrich.plan_job(job_file)]
        if status in {401, 404}:
            calls += [lambda: enrich.run_job(job_file), lambda: enrich.check_job(job_file, online=True)]
        for call in calls:
            with pytest.raises(error) as refused:
                call()
            assert type(refused.value).__name__ in enrich.__all__
            assert refused.value.exit_code is error.exit_code


def test_refusals_are_exceptions_with_exit_codes(
    job_file: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What refuses a run is raised, with the exit code and the hint of the command line."""
    with pytest.raises(enrich.JobError) as missing:
        enrich.run_job(workspace.folder / "none.yaml")
    assert missing.value.exit_code is enrich.ExitCode.USAGE
    with lock_ledger(workspace.ledger_location, 0), pytest.raises(enrich.LedgerLocked) as locked:
        enrich.run_job(job_file)
    assert (locked.value.exit_code, bool(locked.value.hint)) == (11, True)
    workspace.ledger_path.write_bytes(b"no database" * 100)
    with pytest.raises(enrich.CommandRefused):
        enrich.run_job(job_file)
    workspace.ledger_path.unlink()
    (workspace.folder / "leads.csv").unlink()
    with pytest.raises(enrich.CommandRefused):
        enrich.run_job(job_file)
    assert [problem.exit_code for problem in enrich.check_job(job_file).problems] == [5]
    monkeypatch.setenv("DATABAR_API_KEY", "")
    monkeypatch.setenv("HOME", str(workspace.folder))
    with pytest.raises(enrich.ApiKeyRejected):
        enrich.plan_job(job_file)


def test_the_api_works_where_an_event_loop_runs(job_file: Path) -> None:
    """In a running event loop, as in Jupyter, the functions work as elsewhere, and restore the handler of SIGINT."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen: list[object] = []

    def note_handler(_: enrich.Progress) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    async def notebook_cell() -> enrich.RunSummary:
        assert enrich.check_job(job_file, online=True).exit_code == 0
        assert enrich.plan_job(job_file).to_submit == 6
        summary = enrich.run_job(job_file, on_progress=note_handler)
        assert seen
        assert all(each == handlers[1] for each in seen)
        return summary

    assert asyncio.run(notebook_cell()).answers == 6
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_signal_handlers_are_those_from_before_the_run(job_file: Path) -> None:
    """In the main thread a run handles signals itself, and gives them back."""

    def own_handler(_number: int, _frame: object) -> None:
        raise AssertionError

    interrupt = signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGTERM, own_handler)
    try:
        enrich.run_job(job_file)
        assert signal.getsignal(signal.SIGTERM) is own_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is interrupt


FORKING_SCRIPT = """
import multiprocessing, sys
from enrich import JobError, plan_job, run_job

def run():
    try:
        print(run_job(sys.argv[1]).submitted, flush=True)
    except JobError as error:
        print(error.message, flush=True)

for _ in range(2):
    child = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    child.start()
    child.join(20)
    plan_job(sys.argv[1])
"""


def test_a_forked_process_is_refused(job_file: Path) -> None:
    """A process that was forked after a first call would wait for ever for the threads of polars; before, it works."""
    result = subprocess.run(
        [sys.executable, "-c", FORKING_SCRIPT, job_file], check=True, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.startswith("6\nthis process was forked")


def test_a_run_works_in_any_thread(job_file: Path) -> None:
    """A run in another thread than the main one needs no signals."""
    summaries: list[enrich.RunSummary] = []
    thread = threading.Thread(target=lambda: summaries.append(enrich.run_job(job_file)))
    thread.start()
    thread.join()
    assert summaries[0].answers == 6


def test_the_async_function_leaves_the_loop_free(job_file: Path) -> None:
    """`run_job_async` does not block the loop, and calls back in the loop's thread."""

    async def program() -> enrich.RunSummary:
        threads: set[int] = set()
        loop_ran = asyncio.Event()

        def note_thread(_: enrich.Progress) -> None:
            threads.add(threading.get_ident())
            loop_ran.set()

        run = asyncio.create_task(enrich.run_job_async(job_file, on_progress=note_thread))
        await loop_ran.wait()
        summary = await run
        assert threads == {threading.get_ident()}
        return summary

    assert asyncio.run(program()).answers == 6


def test_two_runs_of_one_job_exclude_each_other(slow_job: Path) -> None:
    """The second of two runs at the same time is refused, as by the command line; the first can be cancelled."""

    async def program() -> None:
        submitted = asyncio.Event()
        first = asyncio.create_task(enrich.run_job_async(slow_job, on_progress=set_when_submitted(submitted)))
        await submitted.wait()
        with pytest.raises(enrich.LedgerLocked):
            await enrich.run_job_async(slow_job)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(program())


@pytest.mark.parametrize("cancellations", [1, 3])
def test_a_cancelled_run_stores_its_tasks(slow_job: Path, workspace: Workspace, cancellations: int) -> None:
    """Cancelling the task ends the run as SIGINT does: what was sent is submitted, nothing is in doubt.

    However often it is cancelled, CancelledError is raised after the run's end.
    """

    async def program() -> None:
        submitted = asyncio.Event()
        run = asyncio.create_task(enrich.run_job_async(slow_job, on_progress=set_when_submitted(submitted)))
        await submitted.wait()
        for _ in range(cancellations):
            run.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await run
        assert workspace.sql("SELECT exit_code FROM executions") == [(130,)]

    asyncio.run(program())
    assert workspace.sql("SELECT state, count(*) FROM requests GROUP BY state") == [("submitted", 6)]


@pytest.mark.parametrize("in_notebook", [True, False])
def test_sigint_in_an_event_loop_stops_the_run(slow_job: Path, workspace: Workspace, *, in_notebook: bool) -> None:
    """Where a loop runs in the main thread, the first SIGINT ends the run, and the handler is as before."""

    async def program() -> None:
        if in_notebook:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a notebook's kernel, unlike in asyncio.run
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(enrich.Interrupted) as stopped:
            enrich.run_job(slow_job, on_progress=kill_once(signal.SIGINT))
        assert stopped.value.exit_code is enrich.ExitCode.INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is before

    asyncio.run(program())
    assert workspace.sql("SELECT state, count(*) FROM requests GROUP BY state") == [("submitted", 6)]


def test_sigint_before_the_run_is_waited_for(
    slow_job: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT in a loop's thread ends the run also at the moment after its start."""
    submit = ThreadPoolExecutor.submit

    def submit_and_interrupt(*arguments: Any, **named: Any) -> Future[Any]:
        run: Future[Any] = submit(*arguments, **named)
        if threading.current_thread() is threading.main_thread():
            submitted.wait()
            signal.raise_signal(signal.SIGINT)
        return run

    async def program() -> None:
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_interrupt)
        with pytest.raises(enrich.Interrupted):
            enrich.run_job(slow_job, on_progress=set_when_submitted(submitted))

    submitted = threading.Event()
    asyncio.run(program())
    assert workspace.sql("SELECT state, count(*) FROM requests GROUP BY state") == [("submitted", 6)]


def test_an_exception_in_a_loops_thread_ends_the_run(slow_job: Path, workspace: Workspace) -> None:
    """The run ends as after SIGINT when another signal's handler raises an exception while the run is waited for."""

    def expire(*_: object) -> None:
        raise TimeoutError

    async def program() -> None:
        with pytest.raises(TimeoutError):
            enrich.run_job(slow_job, on_progress=kill_once(signal.SIGUSR1))

    before = signal.signal(signal.SIGUSR1, expire)
    asyncio.run(program())
    signal.signal(signal.SIGUSR1, before)
    assert workspace.sql("SELECT exit_code FROM executions") == [(130,)]
    assert workspace.sql("SELECT state, count(*) FROM requests GROUP BY state") == [("submitted", 6)]


def test_a_signal_in_a_script_stops_the_run(slow_job: Path) -> None:
    """In the main thread SIGTERM stops a run as on the command line, and the function raises Interrupted."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(enrich.Interrupted) as stopped:
        enrich.run_job(slow_job, on_progress=kill_once(signal.SIGTERM))
    assert stopped.value.exit_code is enrich.ExitCode.TERMINATED
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_a_failing_callback_does_not_end_the_run(
    job_file: Path, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """An exception in a callback is logged once, and the run goes on; `sys.exit` would leave requests unconfirmed."""

    def fail(_: enrich.Progress) -> None:
        raise error

    assert enrich.run_job(job_file, limit=3, on_progress=fail).answers == 3
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [error]
    caplog.clear()
    assert asyncio.run(enrich.run_job_async(job_file, on_progress=fail)).answers == 3
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [error]


def test_a_sandbox_run_needs_no_key(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `sandbox` the built-in one answers, with a ledger and an output of its own."""
    monkeypatch.delenv("DATABAR_API_KEY")
    monkeypatch.delenv("DATABAR_BASE_URL")
    summary = enrich.run_job(job_file, sandbox=True, limit=0)
    assert (summary.sandbox, summary.submitted) == (True, 0)
    assert str(summary.output).endswith("out.sandbox.csv")


@pytest.mark.long
def test_a_typed_program_of_public_names_runs(job_file: Path, workspace: Workspace) -> None:
    """The example of the documents is accepted by `mypy --strict`, and runs."""
    example = ROOT / "examples" / "python_api.py"
    assert "enrich." not in "".join(
        line for line in example.read_text(encoding="utf-8").splitlines() if line.startswith(("from ", "import "))
    )
    done = subprocess.run(
        [sys.executable, example, job_file], cwd=workspace.folder, check=True, capture_output=True, text=True
    )
    assert "5 of 6 rows found" in done.stdout
