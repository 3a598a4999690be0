"""An API with scripted answers, and runs of a job against it in this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace
from pydantic import SecretStr

from enrich.databar.environment import ApiAccess
from enrich.job.job import load_job
from enrich.ledger.lock import lock_ledger, open_for_run
from enrich.run.context import RunEnvironment, RunOptions
from enrich.run.pipeline import run as run_job
from enrich.run.run_state import Timeouts
from enrich.run.summary import RunSummary
from tests.support.raw_server import ReceivedRequest, Reply, http_reply
from tests.support.short_waits import short_waits
from tests.support.workspace import SHORT_TIMEOUTS, Workspace

TIMEOUTS = replace(SHORT_TIMEOUTS, startup_s=3.0, young_task_s=0.4, outage_s=10.0, no_data_s=0.1)
WATERFALL = {
    "identifier": "email_getter",
    "name": "E-mail",
    "input_params": [{"name": name, "required": True} for name in ("first_name", "last_name", "company")],
    "output_fields": [{"name": "email"}],
    "available_enrichments": [{"id": 833, "name": "Mailhound", "price": "0.5"}],
}


@dataclass
class ScriptedApi:
    """An API whose responses a test can replace; task ids are named after the lead, and `task` answers polls."""

    user: Reply = field(default_factory=lambda: http_reply(200, {"balance": 100, "workspace": "ours"}))
    waterfall: Reply = field(default_factory=lambda: http_reply(200, WATERFALL))
    post: Callable[[str], Reply] = lambda name: http_reply(200, {"task_id": f"t-{name}", "status": "created"})
    task: Callable[[str], Reply] = lambda name: completed_reply(name)  # noqa: PLW0108 - it is defined below
    posts: list[str] = field(default_factory=list)
    polls: list[str] = field(default_factory=list)

    def __call__(self, request: ReceivedRequest) -> Reply:
        """Answer a request."""
        path = request.line.split()[1]
        if request.line.startswith("POST"):
            name = re.findall(rb'"first_name": ?"(\w+)"', request.body)[0].decode()
            self.posts.append(name)
            return self.post(name)
        if "/tasks/" in path:
            name = path.rpartition("-")[2]
            self.polls.append(name)
            return self.task(name)
        if path.endswith("/waterfalls/"):
            return http_reply(200, [WATERFALL])
        return self.user if path.endswith("/me") else self.waterfall

    def clear_requests(self) -> None:
        """Clear the lists of requests."""
        self.posts.clear()
        self.polls.clear()


def completed_reply(name: str, **more: Any) -> Reply:
    """Return a task reply with the lead's address."""
    body = {"task_id": f"t-{name}", "status": "completed", "data": [{"email": f"{name.lower()}@found.example"}]}
    return http_reply(200, body | {"credits_spent": 0.5} | more)


def running_reply(name: str) -> Reply:
    """Return the reply of a running task."""
    return http_reply(200, {"task_id": f"t-{name}", "status": "processing", "data": None, "credits_spent": 0})


def run_once(
    workspace: Workspace, base_url: str, options: RunOptions | None = None, timing: Timeouts = TIMEOUTS
) -> RunSummary:
    """Run the job against a scripted API."""
    job = load_job(workspace.job_file)
    with short_waits(), lock_ledger(job.ledger, 0), open_for_run(job.ledger) as (ledger, _):
        access = ApiAccess(base_url, SecretStr("key-of-the-test"))
        return run_job(job, access, ledger, options or RunOptions(), RunEnvironment(timeouts=timing))


def request_states(workspace: Workspace) -> list[str]:
    """Return the states of the requests in input order."""
    return [state for (state,) in workspace.sql("SELECT state FROM requests ORDER BY id")]
