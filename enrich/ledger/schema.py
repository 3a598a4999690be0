"""The ledger's tables: an SQL script for each database, and a script for each later version.

The version of a ledger is the number of scripts it has had: `PRAGMA user_version` of a SQLite file, the table `ledger`
of a PostgreSQL schema.
"""

from __future__ import annotations

from importlib.resources import files

#: `PRAGMA application_id` of a ledger: a SQLite file with another one belongs to another program.
APPLICATION_ID = 0x656E7231
#: The same of ledgers that were made before the first release.
UNRELEASED_MARK = 0x656E7269

#: Columns of text that is JSON, by their tables.
JSON_COLUMNS = {
    "waterfalls": ("description", "providers"),
    "calls": ("canonical",),
    "executions": ("receipt", "paths", "pulse"),
    "requests": ("params",),
    "attempts": ("answer",),
}


def _script(name: str) -> str:
    return (files("enrich.ledger") / name).read_text(encoding="utf-8")


#: The scripts of a SQLite file and of a PostgreSQL schema; a new version of the tables is a new script at the end.
MIGRATIONS = [_script("schema.sql")]
POSTGRES_MIGRATIONS = [_script("schema_postgres.sql")]


def statements(script: str) -> list[str]:
    """Split a script into its statements, which an empty line separates."""
    return [statement for part in script.split(";\n\n") if (statement := part.strip().removesuffix(";"))]
