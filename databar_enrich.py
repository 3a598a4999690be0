"""The process of the command `enrich`: checks the platform and the installation before anything else is imported.

It is outside the package `enrich` because another distribution may have replaced files of that.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

#: The distribution of this file, as its files and folders are named.
DISTRIBUTION = "databar_enrich"
WINDOWS = "Windows is not supported: run enrich in WSL (Windows Subsystem for Linux), as on Linux"
ISOLATE = "install databar-enrich in an environment of its own, as pipx and `uv tool` do"


def main() -> None:
    """Run the command line and end the process. Where it cannot work, print the reason in one line and exit with 2."""
    problem = WINDOWS if sys.platform == "win32" else find_conflict(Path(__file__).resolve().parent)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"exit_code": 2, "error": problem}))
        sys.exit(2)
    # Collect cycles less often: batches hold thousands of short-lived tuples, and collection took a third of the time.
    gc.set_threshold(100_000, 50, 100)
    from enrich.cli import main as run  # noqa: PLC0415 - cannot be imported everywhere

    end_process(run())


def end_process(code: int) -> NoReturn:
    """Run the exit functions and end the process. The interpreter's shutdown is skipped: it only frees memory."""
    # Ray has ended before: its exit functions can wait for a minute, and its threads can abort the process.
    if "ray" not in sys.modules:
        atexit._run_exitfuncs()  # noqa: SLF001 - there is no public name
    os._exit(code)


def find_conflict(folder: Path) -> str | None:
    """Return why the package `enrich` is not, or not only, that of the distribution in this folder; None: it is."""
    found = find_spec("enrich")
    origin = None if found is None else found.origin
    if origin is None or Path(origin).resolve() != folder / "enrich" / "__init__.py":
        return f"Python finds another package `enrich` ({origin or 'without files of ours'}): {ISOLATE}"
    others = [name for name in _owners(folder) if not name.startswith(f"{DISTRIBUTION}-")]
    if others:
        return f"{', '.join(sorted(others))} has files in the package `enrich`, too: {ISOLATE}"
    return None


def _owners(folder: Path) -> list[str]:
    """Return the distributions installed in a folder that have files in the package `enrich`."""
    return [
        path.parent.stem
        for pattern, name in (("*.dist-info/RECORD", b"enrich/"), ("*.egg-info/top_level.txt", b"enrich\n"))
        for path in folder.glob(pattern)
        if (content := path.read_bytes()).startswith(name) or b"\n" + name in content
    ]
