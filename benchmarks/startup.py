"""The first second: the processor time of commands over a job of 250 rows, as a multiple of an import of polars.

The control is `python -c 'import polars, sqlite3, asyncio'`. All contenders take turns; the least time of each counts,
because others on the machine can only add to it. All modules are compiled before. `run` has nothing to send.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.leads import write_job
from benchmarks.meter import format_table
from benchmarks.server import ROOT, start_server

CONTROL = "import polars, sqlite3, asyncio"
ROWS = 250


def processor_time(command: list[str], environ: dict[str, str]) -> float:
    """Run a command and return its processor time in seconds. Raises CalledProcessError."""
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=said)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_server() as server:
        job = str(write_job(Path(folder), ROWS))
        compiled = {"PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
        environ = {"PATH": os.defpath, "HOME": folder, **compiled, **server.environ}
        enrich = [sys.executable, "-m", "enrich"]
        processor_time([*enrich, "run", job, "--yes"], environ)
        commands = {
            "control: polars": [sys.executable, "-c", CONTROL],
            "enrich --help": [*enrich, "--help"],
            "enrich status": [*enrich, "status", job],
            "enrich runs": [*enrich, "runs", job],
            "enrich check": [*enrich, "check", job],
            "enrich run": [*enrich, "run", job],
        }
        rounds = [
            [processor_time(command, environ) for command in commands.values()] for _ in range(options.rounds + 1)
        ]
    # The first round only warms the caches.
    least = [min(times) for times in zip(*(rounds[1:] or rounds), strict=True)]
    lines = [[name, f"{time:.3f}", f"{time / least[0]:.2f}"] for name, time in zip(commands, least, strict=True)]
    print(format_table([f"{ROWS} rows", "CPU s", "of control"], lines))


if __name__ == "__main__":
    main()
