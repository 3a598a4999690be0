"""Where a file lies, on this machine or in a storage of the cloud, and what its name says of its format."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["csv", "jsonl", "parquet", "xlsx"]

#: The input that comes in through a pipe. Every other path of a job is absolute.
STDIN = Path("-")

_ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
}
_SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/?(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Url:
    """The address of an object in a storage, `s3://bucket/key`, or of all below a folder, `s3://bucket/folder/`."""

    scheme: str
    bucket: str
    key: str

    @property
    def name(self) -> str:
        """The last part of the key, as a file or a folder would be called."""
        return self.key.rstrip("/").rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        """Tell whether it means all objects below it."""
        return self.key.endswith("/")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"


Place = Path | Url


def locate(base: Path, named: str | Path) -> Place:
    """Find what a path or a URL means; a path is relative to `base`. Raises ValueError for a URL of no use."""
    match = _URL.fullmatch(str(named))
    if match is None:
        return Path(os.path.normpath(base / named))
    scheme, bucket, key = match[1].lower(), match[2], match[3]
    if scheme not in _SCHEMES:
        raise ValueError(f"`{scheme}://` is no storage that is known: use {', '.join(f'{it}://' for it in _SCHEMES)}")
    if "@" in bucket:
        raise ValueError("a URL holds no credentials: they come from the environment")
    if not bucket or not key.strip("/"):
        raise ValueError(f"a storage URL names a bucket and an object: {scheme}://bucket/leads.csv")
    return Url(scheme, bucket, key)


def locate_input(base: Path, named: str) -> Place:
    """Find the input: also a folder, a pattern, in which the base stands for itself, or what comes through a pipe."""
    if named == str(STDIN):
        return STDIN
    plain = locate(base, named)
    return locate(Path(glob.escape(str(base))), named) if is_pattern(Path(named)) and is_pattern(plain) else plain


def is_pattern(where: Place) -> bool:
    """Tell whether a place means all files that match it; a file of this very name on this machine means itself."""
    if isinstance(where, Url):
        return has_signs(where.key)
    return has_signs(str(where)) and not os.path.exists(where)  # noqa: PTH110 - Path.exists raises for a name that is too long


def has_signs(name: str) -> bool:
    """Tell whether a name has the signs of a pattern."""
    return any(sign in name for sign in "*?[")


def is_dataset(target: Place) -> bool:
    """Tell whether an output is a folder of parts: its name has no ending of a file."""
    return format_of(target.name) is None


def format_of(name: str) -> Format | None:
    """Tell the format by the ending of a file's name, None when it says nothing."""
    plain = name.lower()
    ending = os.path.splitext(plain.removesuffix(".gz"))[1]  # noqa: PTH122 - a name, of which `.csv` is an ending too
    found = _ENDINGS.get(ending)
    return None if found in ("parquet", "xlsx") and plain.endswith(".gz") else found


def separator_of(name: str) -> str:
    """Tell the separator by the ending of a file's name."""
    return "\t" if name.lower().removesuffix(".gz").endswith(".tsv") else ","
