"""Reads small files as a whole: never more than a bound, and never waiting for a pipe without a writer."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

#: Keys, jobs, plans and addresses are far smaller.
MOST_BYTES = 1 << 20
#: The time in seconds in which a pipe (`<(…)`) must be read to its end.
PIPE_S = 10.0


def read_bounded(path: Path, at_most: int = MOST_BYTES) -> bytes:
    """Read a file, or what a writer at the other end of a pipe sends. Raises OSError that says what is wrong."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.isatty(descriptor):
            raise OSError(errno.EINVAL, "it is a terminal")
        if stat.S_ISCHR(status.st_mode):  # such as /dev/zero
            at_most = min(at_most, MOST_BYTES)
        content = bytearray()
        latest = time.monotonic() + PIPE_S
        while chunk := _chunk(descriptor, at_most + 1 - len(content), latest):
            content += chunk
            if len(content) > at_most:
                raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes")
        if not content and stat.S_ISFIFO(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe that nothing is written to")
        return bytes(content)
    finally:
        os.close(descriptor)


def read_text(path: Path, at_most: int = MOST_BYTES) -> str:
    """Read UTF-8 text, with or without a mark at its beginning. Raises OSError, UnicodeDecodeError."""
    return read_bounded(path, at_most).decode("utf-8-sig")


def _chunk(descriptor: int, size: int, latest: float) -> bytes:
    while True:
        try:
            return os.read(descriptor, min(size, MOST_BYTES))
        except BlockingIOError:
            if not select.select([descriptor], [], [], max(0.0, latest - time.monotonic()))[0]:
                raise TimeoutError(errno.ETIMEDOUT, "it is a pipe whose writer does not finish") from None
