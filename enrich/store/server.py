"""What speaks to a PostgreSQL server, loaded when a ledger is kept there: few need it, and it is an extra."""

from __future__ import annotations

from types import ModuleType

from enrich.errors import JobError


def load_postgres() -> ModuleType:
    """Load `enrich.store.pgledger`. Raises JobError when its driver was not installed."""
    try:
        from enrich.store import pgledger as loaded  # noqa: PLC0415 - it would take its time from everybody
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise
        hint = "pip install 'databar-enrich[cluster]'"
        raise JobError("a ledger in PostgreSQL needs the extra `cluster`", hint) from error
    return loaded
