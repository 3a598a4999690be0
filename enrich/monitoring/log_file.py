"""The run log: one JSON object per line, versioned, times in UTC, rotated; no personal data and no cells of any file.

Several processes may write to one file. Each line is written under a lock on the file that has the path at that
moment, so no line is lost when the file is renamed (by enrich at 10 MB, or by logrotate).
"""

from __future__ import annotations

import errno
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

from enrich.errors import UNWRITABLE_HINT, CommandRefused
from enrich.job.local_files import make_folder
from enrich.models import iso_time
from enrich.run.progress import Progress

VERSION = 1
PROGRESS_INTERVAL_S = 60.0
MAX_BYTES = 10_000_000
BACKUP_COUNT = 5

#: Text after these phrases may quote what was sent (in the API's message), or line 1 of a file: a lead, if the file has
#: no header.
_MAY_QUOTE = re.compile(
    r"(HTTP \d{3}|has duplicate column names|its header differs from that of|cannot be computed|"
    r"not a polars SQL expression).*",
    re.DOTALL,
)


def redact_message(message: str) -> str:
    """Remove the part of an error message that may quote data; stderr shows the full message."""
    return _MAY_QUOTE.sub(r"\1", message)


class RunLog:
    """Writes the log lines of one run; without a handler, nothing is written."""

    def __init__(
        self,
        handler: logging.Handler | None,
        job: str,
        clock: Callable[[], float] = time.monotonic,
        path: Path | None = None,
    ) -> None:
        self.job = job
        self.path = path
        self._handler = handler
        self._clock = clock
        self._progress_at = clock()
        self._last_progress = Progress(total=None, done=0, found=0, spent=0.0, in_flight=0)

    def stop_writing(self) -> None:
        """Write nothing more, and remove the file if it has no line."""
        self._handler = None
        if self.path is not None:
            with suppress(OSError):
                if self.path.is_file() and not self.path.stat().st_size:
                    self.path.unlink()

    def write_event(self, event: str, **values: object) -> None:
        """Write a line; values that are None are left out."""
        if self._handler is None:
            return
        present = {name: value for name, value in values.items() if value is not None}
        fields = {"event": event, "job": self.job, "pid": os.getpid(), **present}
        record = logging.LogRecord("enrich", logging.INFO, "", 0, event, None, None)
        record.fields = fields
        self._handler.handle(record)

    def write_progress(self, progress: Progress, execution: Callable[[], int | None]) -> None:
        """Write at most one line per minute; its rates are those since the line before."""
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
    """Log to a file (mode 0600), if given. Raises CommandRefused at the start; later `on_problem` is called once."""
    if path is None:
        yield RunLog(None, job)
        return
    try:
        make_folder(path.parent)
        _check_is_log(path)
        # Resolve a symlink: otherwise rotation would rename the link, and its target would keep growing.
        handler = _LogHandler(path.resolve() if path.is_file() else path, on_problem)
    except OSError as error:
        is_unread = error.errno == errno.ENXIO and path.is_fifo()
        reason = "it is a pipe without a reader" if is_unread else error.strerror
        raise CommandRefused(f"{path}: the log cannot be written: {reason}", UNWRITABLE_HINT) from error
    try:
        yield RunLog(handler, job, path=path)
    finally:
        with suppress(OSError):
            handler.close()


def _check_is_log(path: Path) -> None:
    """Raise CommandRefused for a file that is not a log, such as leads, a ledger or a device."""
    if path.is_block_device() or (path.is_char_device() and not _is_terminal_or_null(path)):
        raise CommandRefused(f"{path}: the log cannot be written: it is a device", "choose another `--log-file`")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) not in (b"", b'{"v"'):
                raise CommandRefused(f"{path}: this file exists and is not a log", "choose another `--log-file`")


def _is_terminal_or_null(device: Path) -> bool:
    """Return True for a terminal and for /dev/null, False for other devices."""
    if device.samefile(os.devnull):
        return True
    descriptor = os.open(device, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)


class _LogHandler(RotatingFileHandler):
    """Appends whole lines, and takes turns with other processes for writing and rotating."""

    def __init__(self, path: Path, on_problem: Callable[[str], None]) -> None:
        self._on_problem = on_problem
        self._reported = False
        # A pipe or a terminal has no size: since Python 3.13, asking for it fails.
        max_bytes = MAX_BYTES if path.is_file() or not path.exists() else 0
        super().__init__(path, maxBytes=max_bytes, backupCount=BACKUP_COUNT, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        # O_NONBLOCK: opening a pipe without a reader fails instead of blocking.
        descriptor = os.open(self.baseFilename, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK, 0o600)
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "a", encoding="utf-8")

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        at = iso_time(int(record.created * 1000))
        return json.dumps({"v": VERSION, "at": at, **fields}, ensure_ascii=False, default=str)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line under the lock."""
        try:
            with self._lock():
                super().emit(record)
        except OSError:
            self.handleError(record)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Lock the file that has the path now."""
        while True:
            if self.stream is None:
                self.stream = self._open()
            # A separate descriptor, because rotating closes the stream and the lock must outlast that.
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
        """Rotate, or continue in the same file when its folder does not allow that."""
        try:
            super().doRollover()
        except OSError as error:
            self.stream = self._open()
            self._report_once(f"cannot be rotated: {error.strerror}")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        """Report the first failure; the run continues without a log."""
        self._report_once("can no longer be written")

    def _report_once(self, problem: str) -> None:
        if not self._reported:
            self._reported = True
            self._on_problem(f"{self.baseFilename}: the log {problem}")
