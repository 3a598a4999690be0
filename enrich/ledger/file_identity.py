"""The files of a ledger: what is at their paths, and whether it can be a ledger."""

from __future__ import annotations

import codecs
import os
import shlex
import stat
from contextlib import suppress
from pathlib import Path

from enrich.errors import CommandRefused
from enrich.job.local_files import make_folder

_FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of the file at a path. None: there is no file."""
    try:
        file_stat = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, at every commit
    except OSError:
        return None
    return file_stat.st_dev, file_stat.st_ino


def ledger_file_exists(path: Path) -> bool:
    """Return whether a ledger's file exists. Raises CommandRefused for anything that cannot be one.

    A dangling link would create a new ledger at another path, and opening a pipe may block forever.
    """
    try:
        file_stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CommandRefused(
                f"{path}: the ledger is a link to a file that does not exist",
                "restore the file it points to, or remove the link to start a new ledger",
            ) from None
        return False
    except OSError as error:
        raise CommandRefused(f"{path}: the ledger cannot be opened: {error.strerror}", "correct `ledger:`") from error
    kind = next((name for is_kind, name in _FILE_KINDS if is_kind(file_stat.st_mode)), None)
    if kind is not None:
        raise CommandRefused(
            f"{path}: the ledger cannot be opened: this is {kind}", "choose another file for the ledger"
        )
    return True


def check_has_one_name(path: Path) -> None:
    """Raise CommandRefused for a ledger with a hard link: under each name it would have a lock and a journal."""
    if path.stat().st_nlink > 1:
        name = shlex.quote(str(path.resolve()))
        raise CommandRefused(
            f"{path}: the ledger has another name (a hard link), under which another run could damage it",
            f"when no run uses it, replace it by a copy: cp -p {name} {name}.copy && mv {name}.copy {name}",
        )


def check_is_no_other_file(path: Path) -> None:
    """Raise CommandRefused for a file that was never a ledger: it is text, or a file of another known kind.

    The ledger must not be open in this process: closing a file ends all locks that the process has on it, and SQLite
    of another process would then remove the journal.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024)
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except OSError:
        return  # opening it as a ledger raises the reason
    except UnicodeDecodeError:
        text = ""
    is_text = bool(text) and all(sign.isprintable() or sign.isspace() for sign in text)
    if is_text or start.startswith((b"PK\x03\x04", b"PAR1", b"\x1f\x8b", b"%PDF")):
        raise CommandRefused(f"{path}: this file is not a ledger", "choose another file for the ledger")


def make_private_folder(folder: Path) -> None:
    """Create a folder that only its owner can enter, and its parents with the usual rights.

    An existing folder keeps its rights, except our own `.enrich`. Raises OSError.
    """
    make_folder(folder, 0o700)
    if folder.name == ".enrich" and folder.stat().st_mode & 0o077:
        with suppress(OSError):  # it may belong to another user
            folder.chmod(0o700)
