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

#: The schema of a ledger whose URL names none.
SCHEMA = "enrich"
#: What `--sandbox` keeps apart.
SANDBOX = "sandbox"
#: How long a lease is when the URL does not say so, and how short and long it may be, in seconds.
LEASE_S, SHORTEST_LEASE_S, LONGEST_LEASE_S = 30.0, 1.0, 3600.0
_POSTGRES = ("postgresql", "postgres")
#: USER@HOST:PORT,HOST:PORT/DATABASE, each part optional: no password fits in.
_HOST = r"(?:\[[^\]@/?#]*\]|[^@:/?#\[\],]*)(?::\d*)?"
_SERVER = re.compile(rf"(?:[^@:/?#]*@)?{_HOST}(?:,{_HOST})*(?:/[^@/?#]*)?")
_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,52}")


@dataclass(frozen=True, slots=True)
class Postgres:
    """A ledger in a PostgreSQL database: how libpq finds that, and the schema of the ledger's tables.

    `folder` is where on this machine what belongs to the ledger and is not in it lies; `lease_s` is for how many
    seconds a process that says nothing is thought to live. No password is known here: libpq finds it in the
    environment or in `~/.pgpass`.
    """

    conninfo: str
    schema: str
    folder: Path
    lease_s: float = LEASE_S

    def __str__(self) -> str:
        sign = "&" if "?" in self.conninfo else "?"
        lease = "" if self.lease_s == LEASE_S else f"&lease={self.lease_s:g}"
        return f"{self.conninfo}{sign}schema={self.schema}{lease}"


LedgerPlace = Path | Postgres


def locate_ledger(base: Path, named: str | Path, beside: Path) -> LedgerPlace:
    """Find what a path or a URL of a ledger means; `beside` is the folder for what belongs to one in a database.

    Raises ValueError for a URL of no use.
    """
    check_no_password(str(named))
    match = _URL.fullmatch(str(named))
    if match is None:
        return Path(os.path.normpath(base / named))
    if match[1].lower() not in _POSTGRES:
        raise ValueError(f"`{match[1]}://` keeps no ledger: use a file, or postgresql://")
    url = urlsplit(str(named))
    query = parse_qsl(url.query, keep_blank_values=True)
    schema = next((value for name, value in query if name == "schema"), SCHEMA)
    if not _SCHEMA_NAME.fullmatch(schema) or schema.startswith("pg_"):
        raise ValueError(f"`{schema}` is no name for a schema: use small letters, digits and `_`")
    lease = next((value for name, value in query if name == "lease"), f"{LEASE_S:g}").removesuffix("s")
    if not re.fullmatch(r"\d+(\.\d+)?", lease) or not SHORTEST_LEASE_S <= float(lease) <= LONGEST_LEASE_S:
        raise ValueError(
            f"`lease={lease}` must be a number of seconds from {SHORTEST_LEASE_S:g} to {LONGEST_LEASE_S:g}"
        )
    told = urlencode([(name, value) for name, value in query if name not in ("schema", "lease")], quote_via=quote)
    conninfo = f"postgresql://{url.netloc}{url.path}" + (f"?{told}" if told else "")
    return Postgres(conninfo, schema, beside, float(lease))


def check_no_password(named: str) -> None:
    """Refuse the name of a ledger in which a password may be, without saying it. Raises ValueError.

    Also one that the parts of a URL would tear: `postgresql://enrich:1/2@host` has the port 1 for most programs.
    """
    match = _URL.fullmatch(named)
    if match is not None and match[1].lower() in _POSTGRES:
        server, _, query = named.partition("://")[2].partition("?")
        told = not _SERVER.fullmatch(server) or "@" in query or "#" in query
        told = told or any("pass" in name.lower() for name, _ in parse_qsl(query, keep_blank_values=True))
    else:
        told = re.search(r"password\s*=", named, re.IGNORECASE) is not None
    if told:
        raise ValueError(
            "a URL holds no password, and looks like postgresql://user@host:5432/database: "
            "set PGPASSWORD, or keep the password in ~/.pgpass"
        )


def for_sandbox(ledger: LedgerPlace) -> LedgerPlace:
    """Name the ledger that `--sandbox` keeps instead of one."""
    if isinstance(ledger, Postgres):
        return replace(ledger, schema=f"{ledger.schema}_{SANDBOX}")
    return ledger.with_name(f"{ledger.stem}.{SANDBOX}.db")


def beside(ledger: LedgerPlace, ending: str) -> Path:
    """Name a file that lies beside a ledger."""
    if isinstance(ledger, Postgres):
        return ledger.folder / f"{ledger.schema}{ending}"
    return ledger.with_name(f"{ledger.name}{ending}")


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
