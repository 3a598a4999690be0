"""`suppress`: listed people and domains are never sent, in whatever spelling."""

from __future__ import annotations

import random
import string
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enrich.errors import CommandRefused
from enrich.rows.row_selection import Suppression, read_suppression
from enrich.run.context import RunOptions
from tests.support.cases import in_turn
from tests.support.workspace import BOTH_BACKENDS, SandboxApi, Workspace, make_leads

HEADER = ["First Name", "Last Name", "Website", "Email", "Note"]


def read_list(folder: Path, text: str) -> Suppression:
    """Read a list."""
    path = folder / "never.txt"
    path.write_text(text, encoding="utf-8")
    return read_suppression(path)


def is_suppressed(suppression: Suppression, *, website: str = "", note: str = "") -> bool:
    """Return whether a row with this website param and this note is suppressed."""
    (answer,) = suppression.suppressed_rows(pl.DataFrame({"Website": [website], "^Note$": [note]}), [0])
    return bool(answer)


ADDRESS = "Jane.Doe@acme.example"
DOMAIN = "acme.example"


@in_turn(
    ("entry", "website", "note", "expected"),
    [
        (ADDRESS, "", "jane.doe@ACME.example", True),
        (ADDRESS, "", " JANE.DOE@acme.example ", True),
        (ADDRESS, "", "Jane Doe <jane.doe@acme.example>; bob@b.example", True),
        (ADDRESS, "mailto:jane.doe@acme.example?subject=x", "", True),
        (ADDRESS, "", "ask jane.doe@acme.example.", True),
        (ADDRESS, "", "write to jane.doe@acme.example! (*jane.doe@acme.example*)", True),
        (ADDRESS, "", "\u2068jane.doe@acme.example\u2069", True),
        (DOMAIN, "", "jane.doe@acme.example\u200b", True),
        (ADDRESS, "", "bob@b.example/jane.doe@acme.example", True),
        (ADDRESS, "", "bob@b.example?cc=jane.doe@acme.example", True),
        (ADDRESS, "", "bob@b.example+jane.doe@acme.example", True),
        (ADDRESS, "", "jane.doe@acme.example&bob@b.example", True),
        (ADDRESS, "https://b.example/?mail=jane.doe@acme.example", "", True),
        (DOMAIN, "", "bob@b.example&bob@acme.example", True),
        ("a=b@acme.example", "", "a=b@acme.example", True),
        (ADDRESS, "", "bob+jane.doe@acme.example", False),
        (ADDRESS, "", "mary-jane.doe@acme.example", False),
        (ADDRESS, "acme.example", "john@acme.example", False),
        (DOMAIN, "https://www.Acme.example/team", "", True),
        (DOMAIN, "shop.eu.acme.example", "", True),
        (DOMAIN, "ACME.EXAMPLE.", "", True),
        (DOMAIN, "notacme.example", "", False),
        (DOMAIN, "acme.example.org", "", False),
        (DOMAIN, "", "bob@mail.acme.example", True),
        (DOMAIN, "", "acme.example", False),  # the cell is no param
        ("shop.acme.example", "acme.example", "", False),
        ("@acme.example", "acme.example", "", True),
        ("*@acme.example", "", "bob@acme.example", True),
        ("*.acme.example", "shop.acme.example", "", True),
        ("https://www.acme.example/", "acme.example", "", True),
        ("  ACME.example   # since May", "acme.example", "", True),
        ("m\u00fcnchen.example", "http://mu\u0308nchen.example", "", True),
        ("mu\u0308nchen.example", "http://M\u00dcNCHEN.example", "", True),
    ],
)
def test_suppression_rules(tmp_path: Path, entry: str, website: str, note: str, *, expected: bool) -> None:
    """An address suppresses any cell; a domain suppresses itself, its subdomains in params, and its addresses."""
    assert is_suppressed(read_list(tmp_path, f"# never\n\n{entry}\n"), website=website, note=note) is expected


@in_turn(
    "line",
    [
        "acme",
        "a b.example",
        "jane@acme",
        "jane@acme.example, bob@b.example",
        "@",
        "*",
        "a@b@c.example",
        "1.2.3.4",
        "j*@acme.example",
    ],
)
def test_invalid_suppression_line(tmp_path: Path, line: str) -> None:
    """An invalid line is an error with its file and line: a misread list must not be ignored."""
    with pytest.raises(CommandRefused, match=r"never\.txt: line 2 must be"):
        read_list(tmp_path, f"acme.example\n{line}\n")


def test_unreadable_suppression_list(api: SandboxApi, workspace: Workspace) -> None:
    """With a missing list, a folder or a binary file in its place, nothing is sent."""
    workspace.write_job(suppress="never.txt")
    workspace.write_leads(make_leads(1))
    path = workspace.folder / "never.txt"
    message = [workspace.run_in_process("run", "job.yaml", api=api)]
    path.mkdir()
    message.append(workspace.run_in_process("run", "job.yaml", api=api))
    path.rmdir()
    path.write_bytes(b"\xff\xfe\x00")
    message.append(workspace.run_in_process("plan", "job.yaml", api=api))

    assert [(done.exit_code, "never.txt" in done.stderr) for done in message] == [(5, True)] * 3
    assert api.audit()["accepted"] == 0


NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=3)


@given(st.lists(NAMES, min_size=1, max_size=4), st.lists(NAMES, min_size=1, max_size=4), st.integers())
def test_domain_covers_subdomains(listed_: list[str], asked: list[str], seed: int) -> None:
    """A domain covers its subdomains and nothing else, in any case."""
    domain, host = ".".join([*listed_, "example"]), ".".join([*asked, "example"])
    chance = random.Random(seed)
    written = "".join(chance.choice((letter, letter.upper())) for letter in host)
    expected = f".{host}".endswith(f".{domain}")

    suppression = Suppression(frozenset(), frozenset({domain}))

    assert is_suppressed(suppression, website=f"https://{written}/x") is expected
    assert is_suppressed(suppression, note=f"someone@{written}") is expected


@BOTH_BACKENDS
def test_suppressed_rows_are_not_sent(api: SandboxApi, workspace: Workspace) -> None:
    """Suppressed rows are marked in the output and the plan; a request that was already queued is removed."""
    workspace.write_leads([[*lead[:3], f"l{number}@mail.example", ""] for number, lead in enumerate(make_leads(4))])
    workspace.run_job(api, RunOptions(limit=1))
    (workspace.folder / "never.txt").write_text("COMPANY1.example\nL2@mail.example\n")
    workspace.write_job(suppress="never.txt")

    workspace.run_job(api)

    assert {run["params"]["first_name"] for run in api.audit()["runs"]} == {"First0", "First3"}
    assert [(row["enrich_status"], row["enrich_error"]) for row in workspace.read_output()[1:3]] == [
        ("filtered", "on a suppression list")
    ] * 2


def test_suppressed_constant_param(api: SandboxApi, workspace: Workspace) -> None:
    """When a constant param, such as the company of all rows, is listed, nothing is sent."""
    params = "{first_name: First Name, last_name: Last Name, company: {value: www.acme.example}}"
    workspace.write_job(params=params, suppress="never.txt")
    (workspace.folder / "never.txt").write_text("acme.example\n")
    workspace.write_leads(make_leads(3))

    summary = workspace.run_job(api)

    assert (summary.filtered, summary.submitted, api.audit()["accepted"]) == (3, 0, 0)
