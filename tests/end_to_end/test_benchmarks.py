"""The benchmarks run and print their tables; no test depends on the measured values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from benchmarks.__main__ import Script, insert_tables, run_script
from benchmarks.meter import BenchmarkCase, Result, Trial, format_table, measure
from benchmarks.overhead import LONG_RUN, SHORT_RUN, best_loop_rate, steady_state
from benchmarks.server import RunningServer, start_server

#: These tests check no behavior of the program.
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
LEAD = {"first_name": "Ada", "last_name": "Byron", "company": "engine.example"}


def run_benchmark(name: str, *options: str) -> str:
    """Run a benchmark as a user would, and return its output."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def first_cells(printed: str) -> list[str]:
    """Return the first cell of each row of a table."""
    return [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]


def test_overhead_benchmark_output() -> None:
    """Plain loops and whole runs are in one table."""
    printed = run_benchmark("overhead", "--rows", "24", "--seconds", "0")

    names = first_cells(printed)
    assert {"httpx, 10 tasks", "transport, 50 tasks", SHORT_RUN, LONG_RUN} <= set(names)
    assert "steady state" in printed


def test_million_benchmark_output() -> None:
    """A command is compared with its control."""
    printed = run_benchmark("million", "--growth", "30", "--only", "check")

    assert printed.count("control: sqlite3") == printed.count("ledger check") == 1


def test_sdk_client_enriches_every_row() -> None:
    """The vendor's SDK works with the fake API, with single calls and in bulk."""
    pytest.importorskip("databar", reason="the extra `bench` is not installed")
    with start_server() as server:
        single = run_benchmark("vendor", "--rows", "6", "--threads", "3", "--base-url", server.base_url)
        bulk = run_benchmark("vendor", "--rows", "6", "--bulk", "--base-url", server.base_url)

        assert '"rows": 6' in single
        assert '"rows": 6' in bulk
        assert server.counts() == {"run": {"200": 6}, "bulk-run": {"200": 1}, "task": {"200": 7}}


def _post(server: RunningServer, path: str, params: object) -> str:
    body = {"params": params, "enrichments": [833]}
    answer = httpx.post(f"{server.base_url}/waterfalls/email_getter/{path}", json=body, trust_env=False)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["task_id"]
    UUID(task_id)
    return task_id


def test_fake_server_response_shapes() -> None:
    """A single run returns a list with one wrapper; a bulk run returns a list aligned to its inputs, with progress."""
    with start_server() as server:
        tasks = [_post(server, "run", LEAD), _post(server, "bulk-run", [LEAD] * 3)]
        single, bulk = (httpx.get(f"{server.base_url}/tasks/{task}", trust_env=False).json() for task in tasks)
        unknown = httpx.get(f"{server.base_url}/tasks/none", trust_env=False)

    assert single["status"] == bulk["status"] == "completed"
    assert set(single["data"][0]) == {"result", "result_field", "enrichment_data", "steps"}
    assert len({answer["result"]["email"] for answer in bulk["data"]}) == 3
    assert bulk["progress"] == {"total": 3, "completed": 3, "no_data": 0, "failed": 0, "processing": 0}
    assert (single["credits_spent"], bulk["credits_spent"]) == (0.51, 1.53)
    assert unknown.status_code == 404


def test_fake_server_latency() -> None:
    """With a latency, a task is running first."""
    with start_server("--latency", "30") as server:
        task = httpx.get(f"{server.base_url}/tasks/{_post(server, 'run', LEAD)}", trust_env=False).json()

    assert (task["status"], task["data"], task["credits_spent"]) == ("processing", None, 0)


def test_fake_server_rate_limit() -> None:
    """Beyond the burst, answers 429 with the time to retry, and counts it."""
    with start_server("--rate", "0.001", "--burst", "2", "--retry-after", "1") as server:
        answers = [httpx.get(f"{server.base_url}/user/me", trust_env=False) for _ in range(3)]

        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[2].headers["retry-after"] == "1"
        assert server.counts() == {"user": {"200": 2, "429": 1}}


def test_incomplete_contender_is_not_measured(tmp_path: Path) -> None:
    """Refuses to measure a contender that leaves rows out, which would be the fastest."""
    script = tmp_path / "quick.py"
    script.write_text('print(\'{"rows": 1, "elapsed_s": 0.1}\')')
    with start_server() as server, pytest.raises(RuntimeError, match="not every row"):
        measure(BenchmarkCase("quick", 2, lambda *_: [sys.executable, str(script)]), server)


def test_steady_state_figures() -> None:
    """The steady state is the long run minus the short one; the fastest of a kind excludes the interpreter's start."""

    def result(name: str, rows: int, *seconds: float) -> Result:
        return Result(name, tuple(Trial(rows, took + 1, took, 0.5, 50.0, 2 * rows) for took in seconds))

    results = [
        result("httpx, 10 tasks", 100, 1.0, 2.0),
        result(SHORT_RUN, 100, 3.0, 2.0),
        result(LONG_RUN, 300, 3.0, 9.0),
    ]

    assert best_loop_rate(results, "httpx") == 100
    assert steady_state(results) == (200, 0)
    assert results[0].best_rate == 50
    assert results[0].median_rate == pytest.approx((50 + 100 / 3) / 2)
    assert results[0].spread == "40%"
    assert results[1].spread == "29%"
    assert result("alone", 1, 1.0).spread == "-"
    assert (results[0].cpu_s, results[0].requests) == (0.5, 2.0)


def test_markdown_table() -> None:
    """Aligns numbers to the right."""
    assert format_table(("who", "rows/s"), [("a loop", "10")]).splitlines() == [
        "| who    | rows/s |",
        "| ------ | -----: |",
        "| a loop |     10 |",
    ]


def test_slow_script_is_stopped() -> None:
    """A slow script is stopped and does not delay the others."""
    with pytest.raises(RuntimeError, match="server took longer"):
        run_script(Script("server", (), 0.5))


def test_tables_replace_marked_section() -> None:
    """Replaces the section with the same heading; keeps the other sections and the page's text."""
    page = "words\n<!-- measured -->\n## A\nold\n\n## B\nold\n\n<!-- end -->\nmore words\n"
    new = insert_tables(page, ["## B\nnew\n\n", "## C\nnew\n\n"])

    sections = "## A\nold\n\n## B\nnew\n\n## C\nnew\n\n"
    assert new == f"words\n<!-- measured -->\n{sections}<!-- end -->\nmore words\n"
