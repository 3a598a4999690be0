"""Starts the program as a real process, without importing it each time.

The imports take most of a second of processor time, and the tests start hundreds of processes. One server process for
all pytest processes imports the program once, and forks for each start. A forked process has its own environment,
folder, streams, signal dispositions and limits, as an executed one has, and it is killed like one. Only its end is
shorter: it skips the interpreter's teardown of modules, which would copy each page of memory first.

Executed (`python -m enrich`) are Ray's drivers, as Ray's workers import what the driver's `__main__` names, and starts
with variables that the interpreter reads. Tests of the start itself (closed streams, missing packages, documented
commands) call `subprocess` themselves.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.support.stepping_clock import SteppingClock

ROOT = Path(__file__).parents[2]
#: The folder of a `ServerLifetime`. None: all starts are executed.
server_folder: Path | None = None
#: How the names of variables begin that the interpreter reads when it starts.
INTERPRETER_VARIABLES = ("PYTHON", "LC_", "LANG")
#: What commands import when they run.
PRELOADED_MODULES = (
    *("enrich.cli", "enrich.ledger.postgres", "enrich.report.build", "enrich.report.render", "enrich.run.pipeline"),
    *("enrich.sandbox.server", "click.shell_completion", "uvloop"),
)
#: A process id or an exit code, as the server sends it.
NUMBER = struct.Struct("i")


@dataclass(frozen=True)
class ProgramStart:
    """How a process of the program is started.

    `clock`: file with the offset of its clock in seconds. `closed`, `full`: descriptors that are closed, or on a full
    disk. `prelude`: code that a forked process runs before the program, to replace parts of it.
    """

    arguments: Sequence[str]
    folder: str
    environ: Mapping[str, str]
    ignored_signals: Sequence[int] = ()
    new_group: bool = False
    max_file_bytes: int | None = None
    clock: str | None = None
    closed: Sequence[int] = ()
    full: Sequence[int] = ()
    prelude: str = ""

    def start(
        self,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        *,
        execute: bool = False,
    ) -> subprocess.Popen[str]:
        """Start the process; the caller ends it."""
        execute = execute or server_folder is None or "ray" in self.arguments
        if execute or any(name.startswith(INTERPRETER_VARIABLES) for name in self.environ):
            return self._execute(stdin, stdout, stderr)
        return _ForkedProcess(self, stdin, stdout, stderr)

    def _execute(self, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[str]:
        assert not self.prelude
        module, environ = ["enrich"], dict(self.environ)
        if self.clock is not None:
            module, environ["PYTHONPATH"] = ["tests.support.stepping_clock", self.clock], str(ROOT)
        if self.max_file_bytes is not None:  # Python would leave a truncated compiled module behind
            environ["PYTHONDONTWRITEBYTECODE"] = "1"
        return subprocess.Popen(
            [sys.executable, "-m", *module, *self.arguments],
            cwd=self.folder,
            env=environ,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=self._prepare_process,
            text=True,
        )

    def _prepare_process(self) -> None:
        reset_signals(map(signal.Signals, self.ignored_signals))
        if self.new_group:
            os.setpgid(0, 0)
        if self.max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.max_file_bytes, self.max_file_bytes))
        for descriptor in self.full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        for descriptor in self.closed:
            os.close(descriptor)

    def run_forked(self, clock: SteppingClock) -> None:
        """Run the program in a process that the server has forked, whose streams are in place."""
        self._prepare_process()
        if signal.SIGINT not in self.ignored_signals:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as the interpreter does when it starts
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # likewise
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environ)
        time.tzset()
        clock.path = Path(self.clock) if self.clock else None
        sys.dont_write_bytecode = self.max_file_bytes is not None
        for name in [("stdin", "stdout", "stderr")[descriptor] for descriptor in self.closed]:
            setattr(sys, name, None)  # as the interpreter does
            setattr(sys, f"__{name}__", None)
        sys.argv = ["enrich", *self.arguments]
        sys.path[0] = self.folder
        from databar_enrich import end_process  # noqa: PLC0415 - only the server imports the program
        from enrich import cli  # noqa: PLC0415

        exec(self.prelude, {})  # noqa: S102 - a test's own code
        end_process(cli.main())


def reset_signals(ignoring: Iterable[signal.Signals] = ()) -> None:
    """Give a starting process a shell's signal dispositions, however the tests were started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    for number in ignoring:
        signal.signal(number, signal.SIG_IGN)


class _ForkedProcess(subprocess.Popen[str]):
    """A process that the server has forked. It is no child of this process: its exit code comes through a pipe."""

    def __init__(self, start: ProgramStart, stdin: int, stdout: int, stderr: int) -> None:
        self._start = start
        super().__init__(["enrich", *start.arguments], stdin=stdin, stdout=stdout, stderr=stderr, text=True)

    def _execute_child(self, *given: Any) -> None:
        """Let the server fork, where `Popen` would fork and execute."""
        pipes = given[10:16]  # both ends of stdin, of stdout and of stderr
        self._numbers, numbers_writer = os.pipe()
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.connect(_server_address())
            message = json.dumps(asdict(self._start)).encode()
            socket.send_fds(connection, [message], [pipes[0], pipes[3], pipes[5], numbers_writer])
        os.close(numbers_writer)
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined] # those that are the child's now
        self.pid = self._read_number()

    def _read_number(self) -> int:
        data = os.read(self._numbers, NUMBER.size)
        assert data, "the server of processes has ended"
        return int(NUMBER.unpack(data)[0])

    def poll(self) -> int | None:
        """Return the exit code if the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process and return its exit code."""
        if self.returncode is None:
            if not select.select([self._numbers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._read_number()
            os.close(self._numbers)
        return self.returncode


@cache
def _server_address() -> str:
    """Return the address of the server; the first pytest process that needs it starts it."""
    assert server_folder
    address = server_folder / "program.socket"
    with FileLock(server_folder / "program.lock"):
        if not address.exists():
            with closing(socket.socket(socket.AF_UNIX)) as listener, (server_folder / "life").open("rb") as lifetime:
                listener.bind(str(address))
                listener.listen(64)
                inherited = (listener.fileno(), lifetime.fileno())
                subprocess.run(
                    [sys.executable, "-m", "tests.support.program", *map(str, inherited)],
                    cwd=ROOT,
                    env={"PATH": os.defpath},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=inherited,
                    check=True,
                )
    return str(address)


def _serve(listener: socket.socket, lifetime_pipe: int) -> ProgramStart:
    """Fork a process for each connection until `lifetime_pipe` is closed; returns in each forked process only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no parent of a forked process is waited for
    while True:
        ready, _, _ = select.select([listener.fileno(), lifetime_pipe], [], [])
        if lifetime_pipe in ready:
            os._exit(0)
        with closing(listener.accept()[0]) as connection:
            message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 4)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(lifetime_pipe)
            listener.close()
            _fork_and_wait(descriptors)
            return ProgramStart(**json.loads(message))
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_and_wait(descriptors: Sequence[int]) -> None:
    """Fork the process of the program, in which this returns; send its id, and its exit code when it has ended."""
    *streams, numbers = descriptors
    pid = os.fork()
    if pid == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    if pid:
        with suppress(BrokenPipeError):
            os.write(numbers, NUMBER.pack(pid))
            _, status = os.waitpid(pid, 0)
            os.write(numbers, NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    os.close(numbers)


def main() -> None:
    """Import the program, then serve."""
    listener, lifetime_pipe = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    if os.fork():  # no child of the pytest process that starts it
        os._exit(0)
    clock = SteppingClock(None)
    time.time, time.time_ns = clock.time, clock.time_ns  # before the import, as some modules keep them
    import enrich.commands  # noqa: PLC0415

    commands = pkgutil.walk_packages(enrich.commands.__path__, "enrich.commands.")
    for name in (*(command.name for command in commands), *PRELOADED_MODULES):
        import_module(name)
    gc.collect()
    gc.freeze()
    _serve(listener, lifetime_pipe).run_forked(clock)


if __name__ == "__main__":
    main()
