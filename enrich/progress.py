"""Shows how far an execution is: a bar on a terminal, a line a minute in the log."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Never, TextIO

from tqdm import tqdm

from enrich.errors import Refused
from enrich.model import iso
from enrich.surroundings import Progress

LOG_EVERY_S = 60.0


class Bar:
    """A plain tqdm bar on stderr that knows requests, hits, credits and the time to go."""

    def __init__(self) -> None:
        self._bar: tqdm[Never] | None = None

    def show(self, progress: Progress) -> None:
        """Draw the bar; it appears once there is something to do."""
        if self._bar is None:
            if not progress.total:
                return
            self._bar = tqdm(total=progress.total, unit=" requests", dynamic_ncols=True, smoothing=0.05)
        self._bar.n = progress.done
        hits = f"{progress.found / progress.done:.0%}" if progress.done else "-"
        self._bar.set_postfix_str(f"{hits} hits, {progress.spent:.2f} credits, {progress.in_flight} in flight")

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class Log:
    """The log file: one JSON object a line, UTC, no personal data."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._next = clock() + LOG_EVERY_S

    def show(self, progress: Progress) -> None:
        """Write a line a minute."""
        if self._clock() < self._next:
            return
        self._next += LOG_EVERY_S
        done = {"done": progress.done, "total": progress.total, "found": progress.found}
        self._logger.info("progress", extra={"fields": done | {"credits": progress.spent}})

    def tell(self, text: str) -> None:
        """Write down what the person should know."""
        self._logger.info("note", extra={"fields": {"text": text}})

    def end(self, receipt: Mapping[str, object]) -> None:
        """Write down how the execution ended."""
        self._logger.info("end", extra={"fields": {"receipt": receipt}})


class _Lines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = iso(int(record.created * 1000))
        return json.dumps({"at": at, "event": record.getMessage(), **getattr(record, "fields", {})}, ensure_ascii=False)


@contextmanager
def log_to(path: Path | None) -> Iterator[logging.Logger]:
    """Log to a file (0600), or nowhere. Raises Refused when the file can't be written."""
    logger = logging.getLogger("enrich")
    logger.propagate = False
    logger.setLevel(logging.INFO if path else logging.CRITICAL + 1)
    if path is None:
        yield logger
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.StreamHandler(_private(path))
    except OSError as error:
        raise Refused(f"{path}: the log cannot be written: {error.strerror}") from error
    handler.setFormatter(_Lines())
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        handler.stream.close()


def _private(path: Path) -> TextIO:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    return os.fdopen(descriptor, "a", encoding="utf-8")
