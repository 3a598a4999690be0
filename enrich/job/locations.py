"""Parses file and ledger locations (local paths, object storage URLs, PostgreSQL URLs) and formats by file name."""

from __future__ import annotations

import glob
import os
import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from enrich.models import PLAIN_NUMBER

Format = Literal["csv", "jsonl", "parquet", "xlsx"]

#: Stands for standard input. Every other path of a job is absolute.
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
_WEB_SCHEMES = ("http", "https")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/?(.*)", re.DOTALL)
#: An object's name with an empty part, `.` or `..` between its slashes, or with a control character.
_UNUSABLE_KEY = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f]")


class ObjectUrl(Struct, frozen=True):
    """URL of an object in object storage (`s3://bucket/key`), or of all objects in a folder (`s3://bucket/folder/`)."""

    scheme: str
    bucket: str
    key: str

    @property
    def name(self) -> str:
        """The last part of the key, which is the name of the file or folder."""
        return self.key.rstrip("/").rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        """Whether the URL stands for all objects in a folder."""
        return self.key.endswith("/")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"


class WebUrl(Struct, frozen=True):
    """A web address that a table is read from. As text it has only host and file: the rest may be a secret."""

    url: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return urlsplit(self.url).path.rpartition("/")[2]

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        file = f"/{self.name}" if format_of(self.name) is not None else ""
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/…{file}"


Location = Path | ObjectUrl
InputLocation = Location | WebUrl

DEFAULT_SCHEMA = "enrich"
#: Part of the names of what `--sandbox` writes (files, schema), which keeps them apart from the real ones.
SANDBOX_NAME = "sandbox"
#: Ending of a `--sandbox` ledger, which is in the same folder as the real one.
SANDBOX_LEDGER_SUFFIX = f".{SANDBOX_NAME}.db"
#: Endings before which `sandbox_file_name` puts its mark. `.gz` may follow where a format allows it.
_KNOWN_ENDING = re.compile(r"(?:\.(?:csv|tsv|jsonl|ndjson)(?:\.gz)?|\.[^.]+)$", re.IGNORECASE)
DEFAULT_LEASE_S, MIN_LEASE_S, MAX_LEASE_S = 30.0, 1.0, 3600.0
_POSTGRES_SCHEMES = ("postgresql", "postgres")
#: USER@HOST:PORT,HOST:PORT/DATABASE, each part optional. A password does not match.
_HOST_PATTERN = r"(?:\[[^\]@/?#]*\]|[^@:/?#\[\],]*)(?::[0-9]*)?"
_SERVER_PATTERN = re.compile(rf"(?:[^@:/?#]*@)?{_HOST_PATTERN}(?:,{_HOST_PATTERN})*(?:/[^@/?#]*)?")
_SCHEMA_PATTERN = re.compile(r"[a-z_][a-z0-9_]{0,52}")


class PostgresLocation(Struct, frozen=True):
    """A ledger in a PostgreSQL database: connection string for libpq and schema of the ledger's tables.

    `local_folder` is the folder on this machine for files that belong to the ledger but are not stored in it.
    A process without a heartbeat counts as alive for `lease_s` seconds. The connection string holds no password:
    libpq reads it from the environment or `~/.pgpass`.
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
    """Parse a ledger's path (relative to `base`) or URL. `local_folder`: of `PostgresLocation`. Raises ValueError."""
    match = _URL.fullmatch(check_no_password(str(path_or_url)))
    if match is None:
        return Path(os.path.normpath(base / path_or_url))
    if match[1].lower() not in _POSTGRES_SCHEMES:
        raise ValueError(f"`{match[1]}://` cannot be used for a ledger: use a file, or postgresql://")
    url = urlsplit(str(path_or_url))
    query = parse_qsl(url.query, keep_blank_values=True)
    schema = next((value for name, value in query if name == "schema"), DEFAULT_SCHEMA)
    if not _SCHEMA_PATTERN.fullmatch(schema) or schema.startswith("pg_"):
        raise ValueError(f"`{schema}` is not a schema name: use lowercase letters, digits and `_`")
    lease = next((value for name, value in query if name == "lease"), f"{DEFAULT_LEASE_S:g}").removesuffix("s")
    if not PLAIN_NUMBER.fullmatch(lease) or not MIN_LEASE_S <= float(lease) <= MAX_LEASE_S:
        raise ValueError(f"`lease={lease}` must be a number of seconds from {MIN_LEASE_S:g} to {MAX_LEASE_S:g}")
    remaining_query = urlencode(
        [(name, value) for name, value in query if name not in ("schema", "lease")], quote_via=quote
    )
    conninfo = f"postgresql://{url.netloc}{url.path}" + (f"?{remaining_query}" if remaining_query else "")
    return PostgresLocation(conninfo, schema, local_folder, float(lease))


def check_no_password(path_or_url: str) -> str:
    """Return a ledger's path or URL. Raises ValueError if it may contain a password. The message does not show it.

    This includes a password that splits the URL: most programs read `postgresql://enrich:1/2@host` as port 1.
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
            "a URL must be postgresql://user@host:5432/database, without a password: set PGPASSWORD, or use ~/.pgpass"
        )
    return path_or_url


def sandbox_ledger_location(ledger: LedgerLocation) -> LedgerLocation:
    """Return the ledger location that `--sandbox` uses instead of `ledger`."""
    if isinstance(ledger, PostgresLocation):
        return replace(ledger, schema=f"{ledger.schema}_{SANDBOX_NAME}")
    return ledger.with_name(f"{ledger.stem}{SANDBOX_LEDGER_SUFFIX}")


def is_sandbox_ledger(path: Path) -> bool:
    """Check whether a file is named as the ledger of a sandbox, or as a copy of one: `job.sandbox.db.backup`."""
    return SANDBOX_LEDGER_SUFFIX in path.name


def sandbox_state_path(sandbox_ledger: LedgerLocation) -> Path:
    """Return the file in which the sandbox of a ledger keeps its tasks and requests."""
    if isinstance(sandbox_ledger, PostgresLocation):
        return path_beside_ledger(sandbox_ledger, ".api.db")
    return sandbox_ledger.with_suffix(".api.db")


def sandbox_file_name(path_or_url: str) -> str:
    """Return the name under which `--sandbox` writes a file, folder or URL: `out/a.csv.gz` is `out/a.sandbox.csv.gz`.

    Two names never become one. strftime codes stay as they are.
    """
    name = path_or_url.rstrip("/")
    slashes = path_or_url[len(name) :]
    folder, slash, last = name.rpartition("/")
    # In a folder's name a dot begins no ending, and what begins with its only dot has none.
    ending = None if slashes else _KNOWN_ENDING.search(last, 1)
    at = len(last) if ending is None else ending.start()
    return f"{folder}{slash}{last[:at]}.{SANDBOX_NAME}{last[at:]}{slashes}"


def is_sandbox_file_name(path_or_url: str) -> bool:
    """Check whether `sandbox_file_name` gives this name to some file."""
    before, mark, after = path_or_url.rpartition(f".{SANDBOX_NAME}")
    return bool(mark) and sandbox_file_name(before + after) == path_or_url


def real_ledger_location(sandbox_ledger: PostgresLocation) -> PostgresLocation:
    """Return the ledger whose sandbox this ledger is."""
    return replace(sandbox_ledger, schema=sandbox_ledger.schema.removesuffix(f"_{SANDBOX_NAME}"))


def path_beside_ledger(ledger: LedgerLocation, suffix: str) -> Path:
    """Return the path of a local file that belongs to a ledger. For a file ledger it is in the same folder."""
    if isinstance(ledger, PostgresLocation):
        return ledger.local_folder / f"{ledger.schema}{suffix}"
    return ledger.parent / f"{ledger.name}{suffix}"


def as_argument(path: Path | str) -> str:
    """Return a path as a word of a command: with a leading dash it would be parsed as an option."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def is_url(text: str) -> bool:
    """Check whether a text is a URL, not the path of a file on this machine."""
    return _URL.fullmatch(text) is not None


def parse_location(base: Path, path_or_url: str | Path) -> Location:
    """Parse a path (relative to `base`) or an object storage URL. Raises ValueError for an unusable URL."""
    match = _URL.fullmatch(str(path_or_url))
    if match is None:
        return Path(os.path.normpath(base / path_or_url))
    scheme, bucket, key = match[1].lower(), match[2], match[3]
    if scheme in _WEB_SCHEMES:
        raise ValueError(f"`{scheme}://` is for input only")
    if scheme not in _URL_SCHEMES:
        raise ValueError(
            f"`{scheme}://` is an unknown object storage: use {', '.join(f'{it}://' for it in _URL_SCHEMES)}"
        )
    if "@" in bucket:
        raise ValueError("a URL must have no credentials: they come from the environment")
    if not bucket or not key.strip("/"):
        raise ValueError(f"an object storage URL needs a bucket and an object: {scheme}://bucket/leads.csv")
    if _UNUSABLE_KEY.search(key.removesuffix("/")):
        raise ValueError("an object's name cannot have `//`, `/./`, `/../` or a control character")
    return ObjectUrl(scheme, bucket, key)


def parse_input_location(base: Path, path_or_url: str) -> InputLocation:
    """Parse the input's location: a file, a folder, a pattern, a URL or `-` (stdin). Raises ValueError for a bad URL.

    Wildcards in `base` are escaped, so only `path_or_url` is a pattern.
    """
    if path_or_url == str(STDIN):
        return STDIN
    if _is_web_url(path_or_url):
        return _parse_web_url(path_or_url)
    location = parse_location(base, path_or_url)
    return (
        parse_location(Path(glob.escape(str(base))), path_or_url)
        if is_pattern(Path(path_or_url)) and is_pattern(location)
        else location
    )


def hide_secrets(url: str) -> str:
    """Return a URL as it may be shown: of a web address only host and file."""
    if not _is_web_url(url):
        return url
    try:
        return str(_parse_web_url(url))
    except ValueError:
        return "https://…"


def _is_web_url(path_or_url: str) -> bool:
    match = _URL.fullmatch(path_or_url)
    return match is not None and match[1].lower() in _WEB_SCHEMES


def _parse_web_url(url: str) -> WebUrl:
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError for a number that is no port
    if not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError("must be an address such as https://crm.example/leads.csv")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL must have no user and no password")
    if parts.scheme != "https" and not is_loopback(parts.hostname):
        raise ValueError("must be an https:// address (http:// only on loopback)")
    return WebUrl(url)


def is_loopback(host: str) -> bool:
    """Check whether a host (without brackets) is this machine."""
    host = host.lower().removesuffix(".")
    address = parse_ip(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def parse_ip(host: str) -> IPv4Address | IPv6Address | None:
    """Parse an IP address. An IPv4-mapped IPv6 address becomes IPv4. None for a host name."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def is_pattern(location: InputLocation) -> bool:
    """Check whether a location is a pattern. A local path with wildcards is not a pattern if that very file exists."""
    if isinstance(location, WebUrl):
        return False
    if isinstance(location, ObjectUrl):
        return has_wildcards(location.key)
    return has_wildcards(str(location)) and not os.path.exists(location)  # noqa: PTH110 - Path.exists raises if the name is too long


def has_wildcards(name: str) -> bool:
    """Check whether a name contains a wildcard (`*`, `?` or `[`)."""
    return any(sign in name for sign in "*?[")


def is_dataset(target: Location) -> bool:
    """Check whether an output is a folder of Parquet parts, which is the case if its name has no known extension."""
    return format_of(target.name) is None


def format_of(name: str) -> Format | None:
    """Return the format for a file name's extension. None if the extension is unknown."""
    lowered = _without_query(name).lower()
    extension = os.path.splitext(lowered.removesuffix(".gz"))[1]  # noqa: PTH122 - unlike Path.suffix, it is empty for `leads.csv/`
    found = _FORMAT_BY_EXTENSION.get(extension)
    return None if found in ("parquet", "xlsx") and lowered.endswith(".gz") else found


def separator_of(name: str) -> str:
    """Return the separator for a file name's extension: a tab for .tsv, else a comma."""
    return "\t" if _without_query(name).lower().removesuffix(".gz").endswith(".tsv") else ","


def _without_query(name: str) -> str:
    return re.split(r"[?#]", name, maxsplit=1)[0] if _is_web_url(name) else name


def default_output_path(input_path: InputLocation, name: str, *, sandbox: bool) -> str:
    """Return the path of the output where the job file names none.

    Its stem is that of the input, or the job's `name` if the input is several or has no name.
    """
    has_no_name = isinstance(input_path, WebUrl) and format_of(input_path.name) is None
    stem = name if has_no_name or is_pattern(input_path) else input_path.name.removesuffix(".gz").rsplit(".", 1)[0]
    # A doubled `%` is not read as a strftime code.
    path = f"{'stdin' if input_path == STDIN else stem.replace('%', '%%')}_enriched.csv"
    return sandbox_file_name(path) if sandbox else path
