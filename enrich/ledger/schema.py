"""The ledger's tables: one SQL script for each database, and a further script for each later version.

The version of a ledger is the number of scripts that were applied. It is stored in `PRAGMA user_version` of a SQLite
file and in the table `ledger` of a PostgreSQL schema.
"""

from __future__ import annotations

from importlib.resources import files

#: `PRAGMA application_id` of a ledger. A SQLite file with another one belongs to another program.
APPLICATION_ID = 0x656E7231
#: The application id of ledgers made before the first release.
UNRELEASED_MARK = 0x656E7269

#: Text columns that hold JSON, by table.
JSON_COLUMNS = {
    "waterfalls": ("description", "providers"),
    "calls": ("canonical",),
    "executions": ("receipt", "paths", "pulse"),
    "requests": ("params",),
    "attempts": ("answer",),
}


def _script(name: str) -> str:
    return (files("enrich.ledger") / name).read_text(encoding="utf-8")


#: The scripts for SQLite and PostgreSQL. Append a script for each new version of the tables.
MIGRATIONS = [_script("schema.sql")]
POSTGRES_MIGRATIONS = [_script("schema_postgres.sql")]


def statements(script: str) -> list[str]:
    """Split a script into its statements. An empty line separates them."""
    return [statement for part in script.split(";\n\n") if (statement := part.strip().removesuffix(";"))]
