"""System facts for `enrich doctor`: file systems, permissions, cron's environment, and whether the program starts."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from enrich.commands.paths import absolute_path
from enrich.errors import JobError
from enrich.job.bounded_read import read_text

#: Network file systems, by their names in Linux. SQLite's locks are not safe on them.
_NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|ncpfs|afs|9p|ceph|glusterfs|lustre|beegfs|gpfs|davfs|fuse\..*")
#: FUSE file systems whose data is on this machine.
_LOCAL_FUSE = frozenset(
    {"fuse.lxcfs", "fuse.portal", "fuse.gvfsd-fuse", "fuse.bindfs", "fuse.mergerfs", "fuse.ntfs-3g"}
)
_OCTAL_ESCAPE = re.compile(r"\\([0-7]{3})")
#: A program that is started must finish within this time (seconds).
_START_TIMEOUT_S = 30.0


def file_system_type(mountinfo: str, path: Path) -> str | None:
    """Return the type of the file system of a path (absolute, no links) from the text of /proc/self/mountinfo.

    A line is `36 35 98:0 /root /mount/point rw,noatime - ext4 /dev/sda1 rw`, see proc(5). A later mount covers an
    earlier one at the same mount point. None if the text does not contain it.
    """
    found: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")[0]
        if not dash or len(fields) < 5 or not kind:  # noqa: PLR2004 - the mount point is the fifth
            continue
        point = Path(_OCTAL_ESCAPE.sub(lambda code: chr(int(code[1], 8)), fields[4]))
        if point in (path, *path.parents) and (found is None or len(point.parts) >= found[0]):
            found = len(point.parts), kind
    return None if found is None else found[1]


def is_network_file_system(kind: str | None) -> bool:
    """Whether this is the type of a network file system."""
    return kind is not None and kind not in _LOCAL_FUSE and _NETWORK.fullmatch(kind) is not None


def read_mountinfo() -> str:
    """Return the text of /proc/self/mountinfo, "" on a system without it."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def is_accessible_by_others(path: Path) -> bool:
    """Whether the group or others have any permission on a file."""
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def enrich_command() -> list[str]:
    """Return the absolute command that starts this program."""
    for path in (Path(sys.argv[0]), Path(sys.executable).parent / "enrich"):
        if path.name == "enrich" and path.is_file() and os.access(path, os.X_OK):
            return [str(absolute_path(path))]
    return [sys.executable, "-m", "enrich"]


def startup_error(command: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Start the program as cron would. Return the error, None if it starts."""
    try:
        result = _run_program([*command, "--version"], {**environ, "PYTHONDONTWRITEBYTECODE": "1"})
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode:
        return " ".join(result.stderr.decode(errors="replace").split())[-200:] or f"exit {result.returncode}"
    return None


def file_name_encoding(environ: Mapping[str, str]) -> str:
    """Return the file name encoding of a Python process in this environment, "" if it does not start."""
    script = "import sys; print(sys.getfilesystemencoding())"
    return _run_program([sys.executable, "-c", script], environ).stdout.decode(errors="replace").strip()


def _run_program(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # noqa: S603 - our own program or interpreter
        command,
        env=environ,
        cwd="/",
        capture_output=True,
        timeout=_START_TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def make_cron_environ(given: tuple[str, ...], env_file: Path | None) -> dict[str, str]:
    """Return the environment under cron: HOME, PATH and the crontab's variables. A bare name in `given` is copied."""
    environ = {"HOME": pwd.getpwuid(os.getuid()).pw_dir, "PATH": "/usr/bin:/bin"}
    if env_file is not None:
        try:
            environ |= parse_env_lines(read_text(env_file).splitlines())
        except UnicodeDecodeError:
            raise JobError(f"{env_file} is not UTF-8 text") from None
        except OSError as error:
            raise JobError(f"{env_file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise JobError(f"{env_file}: {error}") from error
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals and name in os.environ:
            value = os.environ[name]
        elif not (name and equals):
            raise click.BadParameter(
                f"`{pair}` must be NAME=VALUE, or the NAME of a variable that is set", param_hint="--env"
            )
        environ[name] = value
    return environ


@contextmanager
def cron_environment(environ: dict[str, str]) -> Iterator[dict[str, str]]:
    """Use cron's environment during the block. Yields a copy of the shell's environment."""
    shell = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield shell
    finally:
        os.environ.clear()
        os.environ.update(shell)


def parse_env_lines(lines: Iterable[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` lines with `#` comments, quotes and `export` as in a shell. Raises ValueError."""
    environ: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"line {number}: must be NAME=VALUE")
            environ[name] = value
    return environ
