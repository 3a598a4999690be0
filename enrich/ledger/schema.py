"""The ledger's tables: one SQL script for each database, and a further script for each later version.

The version of a ledger is the number of scripts that were applied. It is stored in `PRAGMA user_version` of a SQLite
file and in the table `ledger_version` of a PostgreSQL schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from enrich.errors import CommandRefused

#: `PRAGMA application_id` of a ledger. A SQLite file with another one belongs to another program.
APPLICATION_ID = 0x656E7238
#: The application ids of ledgers made before the first release.
UNRELEASED_IDS = (0x656E7269, 0x656E7231, 0x656E7232, 0x656E7233, 0x656E7234, 0x656E7235, 0x656E7236, 0x656E7237)

#: Text columns that hold JSON, by table, with its types.
JSON_COLUMNS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "targets": {"description": (dict,), "providers": (list,)},
    "calls": {"canonical": (dict,)},
    "executions": {"summary": (dict,), "paths": (dict, list), "progress": (dict,)},
    "requests": {"params": (dict,)},
    "attempts": {"answer": (dict,)},
}


def _script(name: str) -> str:
    return (files("enrich.ledger") / name).read_text(encoding="utf-8")


#: The scripts for SQLite and PostgreSQL. Append a script for each new version of the tables.
MIGRATIONS = [_script("schema.sql")]
POSTGRES_MIGRATIONS = [_script("schema_postgres.sql")]


def unreleased_ledger_error(location: object) -> CommandRefused:
    """Return the error for a ledger that a version before the first release made."""
    return CommandRefused(
        f"{location}: this ledger was made by a version of enrich before its first release",
        "finish with that version, then name another one as `ledger`; requests that it has are paid again there",
    )


def check_version(location: object, version: int, newest: int, *, may_upgrade: bool) -> None:
    """Raise CommandRefused for a ledger of a newer version, and of an older one that may not be upgraded now."""
    if version > newest:
        raise CommandRefused(
            f"{location}: this ledger was written by a newer version of enrich",
            f"it has version {version}, this program supports {newest}; install a newer version",
        )
    if version < newest and not may_upgrade:
        raise CommandRefused(
            f"{location}: this ledger is of an older version of enrich",
            "a run upgrades it, and sends nothing new with `enrich run JOB --limit 0`",
        )


def statements(script: str) -> list[str]:
    """Split a script into its statements. Each ends with a semicolon and an empty line."""
    return [statement for part in script.split(";\n\n") if (statement := part.strip().removesuffix(";"))]
