"""The folder of the servers that all pytest processes share, and the pipe that ends them; imports nothing slow."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from pathlib import Path
from typing import Any


def server_user_options() -> dict[str, Any]:
    """Return `subprocess` options for another user when run as root: the server refuses to start as root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def make_folder() -> Path:
    """Make a folder for the server's user, who cannot open pytest's own. It is in memory if those are."""
    folder = Path(tempfile.mkdtemp(prefix="enrich-postgres-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
    if user_options := server_user_options():
        os.chown(folder, user_options["user"], user_options["group"])
    return folder


class ServerLifetime:
    """The folder and pipe that the server of all pytest processes depends on; starts nothing."""

    def __init__(self) -> None:
        self.folder = make_folder()
        os.mkfifo(self.folder / "life")
        self._pipe = os.open(self.folder / "life", os.O_RDWR)  # write-only would wait for a reader

    def close(self) -> None:
        """Close the pipe: a running server stops and removes its folder."""
        os.close(self._pipe)
        if not (self.folder / "data").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
