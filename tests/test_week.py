"""The week of `examples/week.py`: seven nights whose receipts are the vendor's bill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WEEK = Path(__file__).parent.parent / "examples" / "week.py"

pytestmark = pytest.mark.long


def test_the_receipts_of_a_week_are_the_vendors_bill(tmp_path: Path) -> None:
    """Every credit of seven nights is in a receipt or was in doubt, and nothing is paid twice unasked."""
    done = subprocess.run(
        [sys.executable, WEEK, "--folder", tmp_path], capture_output=True, text=True, timeout=170, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    nights = {line.split()[0] for line in done.stdout.splitlines() if "day " in line}
    assert nights == {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}
    assert not (tmp_path / "vendor" / "books.db-wal").exists(), "the sandbox has ended"
