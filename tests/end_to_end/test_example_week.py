"""The week of `examples/week.py`: the summaries of seven runs equal the API's bill."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.program import ProgramStart

if TYPE_CHECKING:
    from types import ModuleType

WEEK = Path(__file__).parents[2] / "examples" / "week.py"

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


@pytest.fixture
def week(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the example. Of its many processes, only `reconcile` is executed; the others are forked."""
    spec = importlib.util.spec_from_file_location("week", WEEK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "week", module)
    spec.loader.exec_module(module)

    execute = module.Week.start_enrich

    def start_enrich(self: Any, *words: str) -> subprocess.Popen[str]:
        if words[0] == "reconcile":
            process: subprocess.Popen[str] = execute(self, *words)
            return process
        clock = self.folder / "vendor" / "clock"
        clock.write_text(str(self.api.call("/__advance", seconds=0)["now"] - module.time.time()))
        environ = {"HOME": str(self.folder), "PATH": os.defpath, "DATABAR_BASE_URL": self.api.base_url}
        environ["DATABAR_API_KEY_FILE"] = str(self.folder / "key")
        return ProgramStart(words, str(self.folder), environ, clock=str(clock)).start()

    monkeypatch.setattr(module.Week, "start_enrich", start_enrich)
    return module


def test_week_summaries_match_bill(
    week: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every credit of seven runs is in a summary or was in doubt; nothing is paid twice without `--retry`."""
    monkeypatch.setattr(sys, "argv", ["week.py", "--folder", str(tmp_path / "week")])

    code = week.main()

    out = capsys.readouterr().out
    assert code == 0, out
    days = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}
    assert days <= {line.split()[0] for line in out.splitlines() if line.strip()}
    assert not (tmp_path / "week" / "vendor" / "books.db-wal").exists(), "the sandbox has ended"


def test_week_reads_exit_codes(week: ModuleType, tmp_path: Path) -> None:
    """The script that shifts the clock ends with the exit code of the program."""
    command = [sys.executable, "-c", week.SHIFTED_CLOCK_SCRIPT, "0", "plan", "missing.yaml"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == 2
