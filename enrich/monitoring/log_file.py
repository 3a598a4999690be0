"""The run log: one JSON object a line, versioned, UTC, rotated; no personal data, and no cell of any file.

Several processes may write to one file. Each line is written under a lock on the file itself, by the file that has
the name at that moment: whoever renames it (we at 10 MB, or logrotate) loses nobody's line.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from enrich.errors import CommandRefused
from enrich.models import iso_time
from enrich.run.context import Progress

VERSION = 1
PROGRESS_INTERVAL_S = 60.0
MAX_BYTES = 10_000_000  # bytes
BACKUP_COUNT = 5

#: What follows may quote what was sent (the API's own words), or a header, which is a lead where it is missing.
_MAY_QUOTE = re.compile(
    r"(HTTP \d{3}|names columns twice|its header differs from that of|cannot be computed|"
    r"not a polars SQL expression).*",
    re.DOTALL,
)


def redact_message(message: str) -> str:
    """Cut off what an error message may quote; stderr has all of it."""
    return _MAY_QUOTE.sub(r"\1", message)


class RunLog:
    """The lines of one run; without a handler there is no log."""

    def __init__(self, handler: logging.Handler | None, job: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.job = job
        self._handler = handler
        self._clock = clock
        self._progress_at = clock()
        self._last_progress = Progress(total=None, done=0, found=0, spent=0.0, in_flight=0)

    def write_event(self, event: str, **values: object) -> None:
        """Write a line; what is None is left out."""
        if self._handler is None:
            return
        present = {name: value for name, value in values.items() if value is not None}
        fields = {"event": event, "job": self.job, "pid": os.getpid(), **present}
        record = logging.LogRecord("enrich", logging.INFO, "", 0, event, None, None)
        record.fields = fields
        self._handler.handle(record)

    def write_progress(self, progress: Progress, execution: Callable[[], int | None]) -> None:
        """Write a line a minute; rates are those since the line before."""
        if self._handler is None or (interval_s := self._clock() - self._progress_at) < PROGRESS_INTERVAL_S:
            return
        before, self._last_progress = self._last_progress, progress
        self._progress_at += interval_s
        self.write_event(
            "progress",
            execution=execution(),
            done=progress.done,
            total=progress.total,
            found=progress.found,
            in_flight=progress.in_flight,
            credits=progress.spent,
            polls=progress.polls,
            rate_limited=progress.rate_limited,
            submitted_per_minute=round(60 * (progress.submitted - before.submitted) / interval_s, 1),
            done_per_minute=round(60 * (progress.done - before.done) / interval_s, 1),
        )


@contextmanager
def open_log(path: Path | None, job: str, on_problem: Callable[[str], None]) -> Iterator[RunLog]:
    """Log to a file (0600), or nowhere. `complain` hears once when it can't be written any more.

    Raises Refused when it can't be written at the start.
    """
    if path is None:
        yield RunLog(None, job)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_is_log(path)
        # A link is followed: it would be rotated away, and the file that it leads to would grow.
        handler = _LogHandler(path.resolve() if path.is_file() else path, on_problem)
    except OSError as error:
        raise CommandRefused(f"{path}: the log cannot be written: {error.strerror}") from error
    try:
        yield RunLog(handler, job)
    finally:
        with suppress(OSError):
            handler.close()


def _check_is_log(path: Path) -> None:
    """Refuse to write into, and to rotate away, what is no log: the leads, a ledger, a device."""
    if path.is_block_device() or (path.is_char_device() and not _is_terminal_or_null(path)):
        raise CommandRefused(f"{path}: the log cannot be written: it is a device", "choose another `--log-file`")
    if path.is_fifo():
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return
        raise CommandRefused(f"{path}: the log cannot be written: it is a pipe that nothing reads from")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) not in (b"", b'{"v"'):
                raise CommandRefused(f"{path}: this is there already, and no log", "choose another `--log-file`")


def _is_terminal_or_null(device: Path) -> bool:
    """Tell a terminal and /dev/null from other devices."""
    if device.samefile(os.devnull):
        return True
    descriptor = os.open(device, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)


class _LogHandler(RotatingFileHandler):
    """Appends whole lines, and rotates in turn with the other processes."""

    def __init__(self, path: Path, on_problem: Callable[[str], None]) -> None:
        self._on_problem = on_problem
        self._reported = False
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=BACKUP_COUNT, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        # A pipe that nothing reads from is refused: opened otherwise, it would be waited for.
        descriptor = os.open(self.baseFilename, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK, 0o600)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "a", encoding="utf-8")

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        at = iso_time(int(record.created * 1000))
        return json.dumps({"v": VERSION, "at": at, **fields}, ensure_ascii=False, default=str)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line when it is our turn."""
        try:
            with self._lock():
                super().emit(record)
        except OSError:
            self.handleError(record)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Lock the file that has the name now."""
        while True:
            if self.stream is None:
                self.stream = self._open()
            # Its own descriptor: rotating closes the stream, and the turn must last longer.
            lock = os.dup(self.stream.fileno())
            try:
                with suppress(OSError):  # a pipe, or a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if self._is_current_file(lock):
                    try:
                        yield
                    finally:
                        with suppress(OSError):
                            fcntl.flock(lock, fcntl.LOCK_UN)
                    return
            finally:
                os.close(lock)
            self.stream.close()
            self.stream = self._open()

    def _is_current_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), Path(self.baseFilename).stat())
        except FileNotFoundError:
            return False

    def doRollover(self) -> None:  # noqa: N802 - logging's name
        """Rotate, or go on in the same file where its folder does not let us."""
        try:
            super().doRollover()
        except OSError as error:
            self.stream = self._open()
            self._report_once(f"cannot be rotated: {error.strerror}")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        """Tell once; the run goes on without."""
        self._report_once("cannot be written any more")

    def _report_once(self, problem: str) -> None:
        if not self._reported:
            self._reported = True
            self._on_problem(f"{self.baseFilename}: the log {problem}")
