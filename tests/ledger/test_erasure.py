"""What `enrich forget` leaves in the ledger: no column with personal data, and no words of the API about a person."""

from __future__ import annotations

from pathlib import Path

from tests.commands.test_forget_and_purge import forget_matching, ledger_bytes
from tests.support.cases import in_turn
from tests.support.raw_server import http_reply, serve_replies
from tests.support.scripted_api import TIMEOUTS, ScriptedApi, run_once
from tests.support.workspace import BOTH_BACKENDS, SHORT_TIMEOUTS, SandboxApi, Workspace, make_leads

#: Text and binary columns without personal data: names, states and prices, what a job says, hashes under a key.
NOT_PERSONAL = {
    "attempts": {"previous_state", "provider", "state", "step"},
    "calls": {"canonical"},
    "delivered": {"field", "job", "path"},
    "executions": {"job", "paths", "progress", "summary"},
    "facts": {"name", "value"},
    "forgotten": {"hash"},
    "known_batches": {"job"},
    "latencies": {"call"},
    "leases": {"name", "process"},
    "requests": {"state"},
    "seen": {"decision"},
    "targets": {"description", "identifier", "kind", "providers"},
}


def text_columns(workspace: Workspace) -> list[tuple[str, str]]:
    """Return table and column of all text and bytes in the ledger."""
    if workspace.server_url:
        return workspace.sql(
            "SELECT table_name, column_name FROM information_schema.columns JOIN pg_tables ON tablename = table_name "
            "AND schemaname = table_schema WHERE table_schema = current_schema() AND data_type IN ('text', 'bytea')"
        )
    return workspace.sql(
        "SELECT m.name, c.name FROM sqlite_master m JOIN pragma_table_info(m.name) c "
        "WHERE m.type = 'table' AND c.type IN ('TEXT', 'BLOB')"
    )


@BOTH_BACKENDS
def test_every_column_is_erased_or_not_personal(workspace: Workspace, api: SandboxApi) -> None:
    """When everyone is forgotten, no value is left in any text or bytes but in those named above."""
    workspace.write_leads([[*lead[:4], "all"] for lead in make_leads(6)])
    api.inject_fault("error-after", 1, "post")
    for more in ({}, {"changes": "{path: changes.csv, key: [Last Name]}", "caps": "{by: Note, max: 9}"}):
        workspace.write_job(**more)
        workspace.run_job(api, timing=SHORT_TIMEOUTS)
    personal = [
        (table, column) for table, column in text_columns(workspace) if column not in NOT_PERSONAL.get(table, ())
    ]
    values = {each: column_values(workspace, *each) for each in personal}
    assert [each for each in personal if not values[each]] == [], "columns that this test leaves empty"

    assert forget_matching(workspace, "Note=all") == 6

    left = {each: values[each] & column_values(workspace, *each) for each in personal}
    assert {each: kept for each, kept in left.items() if kept} == {}


def column_values(workspace: Workspace, table: str, column: str) -> set[object]:
    """Return the values in a column."""
    return {value for (value,) in workspace.sql(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")} - {"{}"}


@in_turn("status", [500, 422])
def test_words_about_another_request_of_a_post(tmp_path: Path, status: int) -> None:
    """What the API said of a bulk POST that it did not accept may name anyone in it: it is erased with each of them."""
    workspace = Workspace(tmp_path)
    workspace.write_leads(make_leads(3))
    workspace.write_job(dispatch="{bulk: 3}")
    api = ScriptedApi(post=lambda _: http_reply(status, {"detail": "Last1 is no name"}))
    with serve_replies(api) as server:
        run_once(workspace, server.base_url, timing=TIMEOUTS)
    assert b"Last1 is no name" in ledger_bytes(workspace)

    assert forget_matching(workspace, "First Name=First1") == 1

    assert b"Last1" not in ledger_bytes(workspace)
    assert b"Last0" in ledger_bytes(workspace)
