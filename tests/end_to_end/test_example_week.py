"""The week of `examples/week.py`: the summaries of seven runs equal the API's bill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WEEK = Path(__file__).parents[2] / "examples" / "week.py"

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


def test_week_summaries_match_bill(tmp_path: Path) -> None:
    """Every credit of seven runs is in a summary or was in doubt; nothing is paid twice without `--retry`."""
    result = subprocess.run(
        [sys.executable, WEEK, "--folder", tmp_path], capture_output=True, text=True, timeout=380, check=False
    )

    assert result.returncode == 0, result.stdout + result.stderr
    days = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}
    assert days <= {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert not (tmp_path / "vendor" / "books.db-wal").exists(), "the sandbox has ended"
