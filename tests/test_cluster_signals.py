"""Whoever ends a run that starts Ray is heard, at whatever moment."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.harness import Api, Office, people, until
from tests.postgres import Postgres

pytest.importorskip("ray", reason="Ray comes with the extra `cluster`")
pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("heard", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_a_signal_is_heard_while_ray_starts(
    api: Api, tmp_path: Path, postgres: Postgres, heard: tuple[signal.Signals, int], after_s: float
) -> None:
    """Ray has handlers of its own, and swallows what is raised in the middle of it; the exit code is ours."""
    number, code = heard
    office = Office(tmp_path, postgres.url(), postgres.environ)
    office.write_job()
    office.write_leads(people(300))
    api.fault("slow", 1000, "post", seconds=1)
    run = office.start("run", "job.yaml", "--engine", "ray", "--workers", "1", api=api)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    until(lambda: bool(children.read_text(encoding="ascii")), at_most=40)  # Ray begins with a process of its own
    time.sleep(after_s)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)

    assert run.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
