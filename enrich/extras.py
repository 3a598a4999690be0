"""Says how to install an extra: a group of packages that only some features need."""

from __future__ import annotations


def install_hint(extra: str) -> str:
    """Return the command that installs enrich with an extra. It is in no index, so the command names a file."""
    return f"pip install 'FILE[{extra}]', where FILE is the wheel of enrich or a folder with its source"
