"""Reads small files as a whole, up to a size limit, without blocking on a pipe that has no writer."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

#: Default size limit in bytes. Key files, job files, plans and address lists are far smaller.
MAX_BYTES = 1 << 20
PIPE_TIMEOUT_S = 10.0


def read_bounded(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file or a pipe. Raises OSError, with the reason in `strerror`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.isatty(descriptor):
            raise OSError(errno.EINVAL, "it is a terminal")
        if stat.S_ISCHR(status.st_mode):  # such as /dev/zero
            max_bytes = min(max_bytes, MAX_BYTES)
        content = bytearray()
        deadline = time.monotonic() + PIPE_TIMEOUT_S
        while chunk := _read_chunk(descriptor, max_bytes + 1 - len(content), deadline):
            content += chunk
            if len(content) > max_bytes:
                raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes")
        if not content and stat.S_ISFIFO(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe without a writer")
        return bytes(content)
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark. Raises OSError, UnicodeDecodeError."""
    return read_bounded(path).decode("utf-8-sig")


def _read_chunk(descriptor: int, size: int, deadline: float) -> bytes:
    while True:
        try:
            return os.read(descriptor, min(size, MAX_BYTES))
        except BlockingIOError:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(errno.ETIMEDOUT, "it is a pipe that does not end") from None
