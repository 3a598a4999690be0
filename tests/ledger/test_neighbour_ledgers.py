"""The search for ledgers in a folder does not disturb those that this process has open."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

from enrich.ledger import records
from enrich.ledger.database import Database
from enrich.ledger.neighbour_ledgers import find_ledger_files

READ_SCRIPT = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("SELECT count(*) FROM requests").fetchone()
db.close()
"""


def test_open_ledger_keeps_its_locks(tmp_path: Path) -> None:
    """Another process that reads and closes the ledger does not remove its journal, as it would without the locks."""
    path = tmp_path / "ledger.db"
    (tmp_path / "leads.csv").write_text("Email\n", encoding="utf-8")
    with closing(Database(path)) as ledger:
        with ledger.transaction():
            records.bind(ledger, {"user": "1"})
        assert find_ledger_files(tmp_path) == [path]
        subprocess.run([sys.executable, "-c", READ_SCRIPT, str(path)], check=True)
        assert (tmp_path / "ledger.db-wal").exists()
