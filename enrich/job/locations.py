"""Where a file lies, on this machine or in a storage of the cloud, and what its name says of its format."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

Format = Literal["csv", "jsonl", "parquet", "xlsx"]

#: The input that comes in through a pipe. Every other path of a job is absolute.
STDIN = Path("-")

_FORMAT_BY_EXTENSION: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
}
_URL_SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/?(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ObjectUrl:
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


Location = Path | ObjectUrl

#: The schema of a ledger whose URL names none.
DEFAULT_SCHEMA = "enrich"
#: What `--sandbox` keeps apart.
SANDBOX_NAME = "sandbox"
#: How long a lease is when the URL does not say so, and how short and long it may be, in seconds.
DEFAULT_LEASE_S, MIN_LEASE_S, MAX_LEASE_S = 30.0, 1.0, 3600.0
_POSTGRES_SCHEMES = ("postgresql", "postgres")
#: USER@HOST:PORT,HOST:PORT/DATABASE, each part optional: no password fits in.
_HOST_PATTERN = r"(?:\[[^\]@/?#]*\]|[^@:/?#\[\],]*)(?::\d*)?"
_SERVER_PATTERN = re.compile(rf"(?:[^@:/?#]*@)?{_HOST_PATTERN}(?:,{_HOST_PATTERN})*(?:/[^@/?#]*)?")
_SCHEMA_PATTERN = re.compile(r"[a-z_][a-z0-9_]{0,52}")


@dataclass(frozen=True, slots=True)
class PostgresLocation:
    """A ledger in a PostgreSQL database: how libpq finds that, and the schema of the ledger's tables.

    `folder` is where on this machine what belongs to the ledger and is not in it lies; `lease_s` is for how many
    seconds a process that says nothing is thought to live. No password is known here: libpq finds it in the
    environment or in `~/.pgpass`.
    """

    conninfo: str
    schema: str
    local_folder: Path
    lease_s: float = DEFAULT_LEASE_S

    def __str__(self) -> str:
        separator = "&" if "?" in self.conninfo else "?"
        lease = "" if self.lease_s == DEFAULT_LEASE_S else f"&lease={self.lease_s:g}"
        return f"{self.conninfo}{separator}schema={self.schema}{lease}"


LedgerLocation = Path | PostgresLocation


def parse_ledger_location(base: Path, path_or_url: str | Path, local_folder: Path) -> LedgerLocation:
    """Find what a path or a URL of a ledger means; `beside` is the folder for what belongs to one in a database.

    Raises ValueError for a URL of no use.
    """
    check_no_password(str(path_or_url))
    match = _URL.fullmatch(str(path_or_url))
    if match is None:
        return Path(os.path.normpath(base / path_or_url))
    if match[1].lower() not in _POSTGRES_SCHEMES:
        raise ValueError(f"`{match[1]}://` keeps no ledger: use a file, or postgresql://")
    url = urlsplit(str(path_or_url))
    query = parse_qsl(url.query, keep_blank_values=True)
    schema = next((value for name, value in query if name == "schema"), DEFAULT_SCHEMA)
    if not _SCHEMA_PATTERN.fullmatch(schema) or schema.startswith("pg_"):
        raise ValueError(f"`{schema}` is no name for a schema: use small letters, digits and `_`")
    lease = next((value for name, value in query if name == "lease"), f"{DEFAULT_LEASE_S:g}").removesuffix("s")
    if not re.fullmatch(r"\d+(\.\d+)?", lease) or not MIN_LEASE_S <= float(lease) <= MAX_LEASE_S:
        raise ValueError(f"`lease={lease}` must be a number of seconds from {MIN_LEASE_S:g} to {MAX_LEASE_S:g}")
    remaining_query = urlencode(
        [(name, value) for name, value in query if name not in ("schema", "lease")], quote_via=quote
    )
    conninfo = f"postgresql://{url.netloc}{url.path}" + (f"?{remaining_query}" if remaining_query else "")
    return PostgresLocation(conninfo, schema, local_folder, float(lease))


def check_no_password(path_or_url: str) -> None:
    """Refuse the name of a ledger in which a password may be, without saying it. Raises ValueError.

    Also one that the parts of a URL would tear: `postgresql://enrich:1/2@host` has the port 1 for most programs.
    """
    match = _URL.fullmatch(path_or_url)
    if match is not None and match[1].lower() in _POSTGRES_SCHEMES:
        server, _, query = path_or_url.partition("://")[2].partition("?")
        has_password = not _SERVER_PATTERN.fullmatch(server) or "@" in query or "#" in query
        has_password = has_password or any(
            "pass" in name.lower() for name, _ in parse_qsl(query, keep_blank_values=True)
        )
    else:
        has_password = re.search(r"password\s*=", path_or_url, re.IGNORECASE) is not None
    if has_password:
        raise ValueError(
            "a URL holds no password, and looks like postgresql://user@host:5432/database: "
            "set PGPASSWORD, or keep the password in ~/.pgpass"
        )


def sandbox_ledger_location(ledger: LedgerLocation) -> LedgerLocation:
    """Name the ledger that `--sandbox` keeps instead of one."""
    if isinstance(ledger, PostgresLocation):
        return replace(ledger, schema=f"{ledger.schema}_{SANDBOX_NAME}")
    return ledger.with_name(f"{ledger.stem}.{SANDBOX_NAME}.db")


def path_beside_ledger(ledger: LedgerLocation, suffix: str) -> Path:
    """Name a file that lies beside a ledger."""
    if isinstance(ledger, PostgresLocation):
        return ledger.local_folder / f"{ledger.schema}{suffix}"
    return ledger.with_name(f"{ledger.name}{suffix}")


def parse_location(base: Path, path_or_url: str | Path) -> Location:
    """Find what a path or a URL means; a path is relative to `base`. Raises ValueError for a URL of no use."""
    match = _URL.fullmatch(str(path_or_url))
    if match is None:
        return Path(os.path.normpath(base / path_or_url))
    scheme, bucket, key = match[1].lower(), match[2], match[3]
    if scheme not in _URL_SCHEMES:
        raise ValueError(
            f"`{scheme}://` is no storage that is known: use {', '.join(f'{it}://' for it in _URL_SCHEMES)}"
        )
    if "@" in bucket:
        raise ValueError("a URL holds no credentials: they come from the environment")
    if not bucket or not key.strip("/"):
        raise ValueError(f"a storage URL names a bucket and an object: {scheme}://bucket/leads.csv")
    return ObjectUrl(scheme, bucket, key)


def parse_input_location(base: Path, path_or_url: str) -> Location:
    """Find the input: also a folder, a pattern, in which the base stands for itself, or what comes through a pipe."""
    if path_or_url == str(STDIN):
        return STDIN
    location = parse_location(base, path_or_url)
    return (
        parse_location(Path(glob.escape(str(base))), path_or_url)
        if is_pattern(Path(path_or_url)) and is_pattern(location)
        else location
    )


def is_pattern(location: Location) -> bool:
    """Tell whether a place means all files that match it; a file of this very name on this machine means itself."""
    if isinstance(location, ObjectUrl):
        return has_wildcards(location.key)
    return has_wildcards(str(location)) and not os.path.exists(location)  # noqa: PTH110 - Path.exists raises for a name that is too long


def has_wildcards(name: str) -> bool:
    """Tell whether a name has the signs of a pattern."""
    return any(sign in name for sign in "*?[")


def is_dataset(target: Location) -> bool:
    """Tell whether an output is a folder of parts: its name has no ending of a file."""
    return format_of(target.name) is None


def format_of(name: str) -> Format | None:
    """Tell the format by the ending of a file's name, None when it says nothing."""
    lowered = name.lower()
    extension = os.path.splitext(lowered.removesuffix(".gz"))[1]  # noqa: PTH122 - a name, of which `.csv` is an ending too
    found = _FORMAT_BY_EXTENSION.get(extension)
    return None if found in ("parquet", "xlsx") and lowered.endswith(".gz") else found


def separator_of(name: str) -> str:
    """Tell the separator by the ending of a file's name."""
    return "\t" if name.lower().removesuffix(".gz").endswith(".tsv") else ","
