"""The rescue file: paid results that could not be written to the ledger, one JSON object per line.

It is in the folder of the ledger (`leads.db.rescue`), or of the output if that folder is missing. The next run imports
and removes it. Disk space for it is reserved when a run starts, so that a full disk does not lose task ids.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from enrich.errors import LOCKED_HINT, CommandRefused, LedgerLocked
from enrich.files.atomic import NO_SPACE_ERRORS, fsync_dir
from enrich.json_text import parse_json
from enrich.ledger.sqlite_errors import DISK_HINT

#: Appended to the ledger's name. Further files of the same ledger end with `.2`, `.3` and so on.
SUFFIX = ".rescue"
#: Reserved bytes for each request in flight, which writes a line of about 600 bytes at most twice; and at least in all.
BYTES_PER_REQUEST, MIN_RESERVED_BYTES = 1536, 128 * 1024
_HINT = "restore it, or move it away: what is in it is paid for, and would be charged again"

Json = Annotated[str, Field(min_length=2)]


class RescuedAttempt(BaseModel):
    """One attempt: the request, its task, and the answer if there is one.

    Times are milliseconds since 1970 (UTC), credits millionths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    format: Literal[1] = 1
    #: The ledger that the attempt belongs to.
    ledger: str
    api_host: str | None = None
    workspace: str | None = None
    #: Id of the attempt in that ledger. A later line with the same id replaces the earlier one.
    attempt: int
    fingerprint: str = Field(pattern="^[0-9a-f]{32}$")
    #: As in the ledger: the canonical call and the params as sent, both JSON.
    call: Json
    params: Json
    paths: list[str] = []
    #: The step of the job that sent it.
    step: str | None = None
    state: Literal["submitting", "submitted", "in_doubt", "refused", "found", "not_found", "failed", "expired"]
    task_id: str | None = None
    claimed_ms: int
    submitted_ms: int | None = None
    settled_ms: int | None = None
    reserved: int = Field(ge=0)
    acknowledged: bool = False
    credits: int | None = None
    provider: str | None = None
    error: str | None = None
    answer: str | None = None
    #: For requests sent as one bulk task: its id in that ledger, the index in the task, and the number of requests.
    bulk_task: int | None = None
    bulk_index: int | None = Field(None, ge=0)
    size: int | None = Field(None, ge=1)

    def to_line(self) -> bytes:
        """Return the attempt as a line of the file."""
        content = self.model_dump(exclude_defaults=True) | {"format": 1}
        return json.dumps(content, ensure_ascii=True).encode() + b"\n"


def find_rescue_files(ledger: Path, other_folders: Sequence[Path]) -> list[Path]:
    """Return the rescue files of a ledger in its folder and in `other_folders`."""
    found = []
    is_rescue_file = re.compile(re.escape(ledger.name + SUFFIX) + r"(\.\d+)?")
    for folder in dict.fromkeys([ledger.parent, *other_folders]):
        try:
            names = sorted(os.listdir(folder))  # noqa: PTH208 - names are all that is needed
        except OSError:
            continue
        found += [folder / name for name in names if is_rescue_file.fullmatch(name)]
    return found


def read_own_rescue_files(ledger: Path, other_folders: Sequence[Path]) -> dict[Path, list[RescuedAttempt]]:
    """Read the rescue files of a ledger. In `other_folders`, those of other ledgers with the same name are left out.

    Raises CommandRefused when one is damaged.
    """
    found = {path: read_rescue_file(path) for path in find_rescue_files(ledger, other_folders)}
    return {
        path: lines
        for path, lines in found.items()
        if path.parent == ledger.parent or all(_is_of_ledger(line, path, ledger) for line in lines)
    }


def _is_of_ledger(line: RescuedAttempt, path: Path, ledger: Path) -> bool:
    """Return whether a line of a file in another folder is of this ledger, not of another one with the same name.

    The folder that contains both the file and the ledger may have been moved since: then nothing is at its old path.
    """
    end = f"/{os.path.relpath(ledger, os.path.commonpath([path, ledger]))}"
    old_folder = line.ledger.removesuffix(end)
    return line.ledger == str(ledger) or (old_folder != line.ledger and not os.path.lexists(old_folder))


def read_rescue_file(path: Path) -> list[RescuedAttempt]:
    """Read a rescue file; the last line about an attempt counts. Raises CommandRefused when it is damaged."""
    try:
        if not path.is_file():
            raise CommandRefused(f"{path}: the rescue file cannot be read: it is not a file", _HINT)
        content = path.read_bytes()
    except OSError as error:
        raise CommandRefused(f"{path}: the rescue file cannot be read: {error.strerror}", _HINT) from error
    # A killed run leaves reserved space, zero bytes, after the last line.
    content = content.rstrip(b"\0")
    if not content.endswith(b"\n"):
        raise CommandRefused(f"{path}: the rescue file is damaged: its last line is not complete", _HINT)
    found: dict[int, RescuedAttempt] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            attempt = RescuedAttempt.model_validate_json(line)
            _check_line(attempt)
        except (ValidationError, ValueError, RecursionError):
            raise CommandRefused(f"{path}:{number}: the rescue file is damaged, or of another version", _HINT) from None
        found[attempt.attempt] = attempt
    return list(found.values())


def _check_line(attempt: RescuedAttempt) -> None:
    """Raise ValueError for a line that contradicts itself."""
    is_known_task = attempt.state in ("submitted", "found", "not_found", "expired")
    is_settled = attempt.state in ("found", "not_found", "failed", "expired")
    texts = (attempt.call, attempt.params, attempt.answer)
    contradictions = (
        any(not isinstance(parse_json(text), dict) for text in texts if text is not None),
        is_known_task and attempt.task_id is None,
        attempt.state in ("found", "not_found") and attempt.answer is None,
        # An unconfirmed attempt may have a task id that came with an error.
        attempt.task_id is not None and attempt.submitted_ms is None and attempt.state != "in_doubt",
        is_settled and attempt.settled_ms is None,
        len({attempt.bulk_task is None, attempt.bulk_index is None, attempt.size is None}) > 1,
    )
    if any(contradictions):
        raise ValueError


class RescueFile:
    """Writes a rescue file. Disk space for it is reserved in the ledger's folder in advance."""

    def __init__(self, ledger: Path, other_folders: Sequence[Path] = (), requests_in_flight: int = 0) -> None:
        """Reserve disk space. `other_folders` are used when the ledger's folder is gone.

        Raises LedgerLocked when another run is writing such a file: the lock file of that run was removed.
        """
        self._ledger = ledger
        self._folders = list(dict.fromkeys([ledger.parent, *other_folders]))
        self._reserved_path = ledger.with_name(f".{ledger.name}.room-{os.getpid()}")
        self._file: int | None = None
        self._end = 0
        #: Path of the file, once something was written.
        self.path: Path | None = None
        self._no_space: OSError | None = None
        reserved = list(ledger.parent.glob(f".{ledger.name}.room-*"))
        if any(map(_is_held, (*reserved, *find_rescue_files(ledger, ())))):
            raise LedgerLocked(f"{ledger}: another run is using this ledger, without a lock", LOCKED_HINT)
        self._reserve_space(reserved, max(MIN_RESERVED_BYTES, requests_in_flight * BYTES_PER_REQUEST))

    def _reserve_space(self, earlier: Iterable[Path], size: int) -> None:
        """Reserve disk space, and free that of killed runs.

        The caller, or the process it works for, holds the ledger's lock. Without the space, the run continues until
        `check_space`. On a file system that cannot reserve any, it continues to its end.
        """
        try:
            for path in earlier:
                pid = path.name.rpartition("-")[2]
                if not pid.isdecimal() or not Path("/proc", pid).exists():
                    path.unlink(missing_ok=True)
            self._file = os.open(self._reserved_path, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            _hold(self._file)
            os.posix_fallocate(self._file, 0, size)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE_ERRORS:
                self._no_space = error
            self._drop_reserved()

    def _drop_reserved(self) -> None:
        with suppress(OSError):
            self._reserved_path.unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def check_space(self) -> None:
        """Raise CommandRefused when the disk is full: the next POST might be charged, and recorded nowhere."""
        if self._no_space is not None:
            message = f"{self._ledger}: the rescue file cannot be written: {self._no_space.strerror}"
            raise CommandRefused(message, DISK_HINT) from self._no_space

    def append(self, lines: Iterable[RescuedAttempt]) -> bool:
        """Append lines and fsync them. Return False when they could not be written anywhere."""
        content = b"".join(line.to_line() for line in lines)
        if not content or self._write(content):
            return True
        # The disk is full, or the file was removed: write everything to another place.
        before = b"" if self._file is None else os.pread(self._file, self._end, 0)
        return any(self._create(folder, before + content) for folder in self._folders)

    def _write(self, content: bytes) -> bool:
        """Append to the file if it is still at its path. The reserved space becomes the file with the first line."""
        path = self.path or self._reserved_path
        try:
            if self._file is None or not os.path.samestat(os.fstat(self._file), path.stat()):
                return False
            if not _write_at(self._file, content, self._end):
                return False
            self.path = self.path or path.rename(_free_path(path.parent, self._ledger.name))
        except OSError:
            return False
        if not self._end:
            with suppress(OSError):
                fsync_dir(path.parent)
        self._end += len(content)
        return True

    def _create(self, folder: Path, content: bytes) -> bool:
        """Create a new file in a folder with all lines so far. Leave nothing behind when that fails."""
        path = _free_path(folder, self._ledger.name)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except FileExistsError:  # another ledger with this name took it in this moment
            return self._create(folder, content)
        except OSError:
            return False
        _hold(file)
        if not _write_at(file, content, 0):
            os.close(file)
            with suppress(OSError):
                path.unlink()
            return False
        if self._file is not None:
            os.close(self._file)
        with suppress(OSError):
            fsync_dir(folder)  # first, so that a power cut leaves one of the two files
            (self.path or self._reserved_path).unlink(missing_ok=True)
        self._file, self._end, self.path = file, len(content), path
        return True

    def close(self) -> None:
        """Truncate the unused reserved space. Without any line, no file remains."""
        if self._file is not None:
            if self.path is not None:
                with suppress(OSError):
                    os.ftruncate(self._file, self._end)
                    os.fsync(self._file)
            os.close(self._file)
            self._file = None
        with suppress(OSError):
            self._reserved_path.unlink(missing_ok=True)


def _write_at(file: int, content: bytes, end: int) -> bool:
    """Write after the last line, which ends at `end`, and fsync. Truncate to it when that fails."""
    try:
        written = 0
        while written < len(content):
            written += os.pwrite(file, content[written:], end + written)
        os.fsync(file)
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, end)
        return False
    return True


def _hold(file: int) -> None:
    """Show other processes that this one is alive and writes the file."""
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    """Return whether a process that is alive writes this file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _free_path(folder: Path, ledger: str) -> Path:
    """Return the first path for a rescue file that is free."""
    names = (f"{ledger}{SUFFIX}{'' if number == 1 else f'.{number}'}" for number in count(1))
    return next(path for name in names if not os.path.lexists(path := folder / name))
