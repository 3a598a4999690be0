"""A sandbox for each test, and a client with short methods."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from enrich.sandbox.server import serve_in_thread
from enrich.sandbox.settings import SandboxSettings

ADA = {"first_name": "Ada", "last_name": "Byron", "company": "engine.example"}


def make_leads(count: int) -> list[dict[str, str]]:
    """Make leads."""
    return [{"first_name": f"Ada{n}", "last_name": "Byron", "company": "engine.example"} for n in range(count)]


class SandboxClient:
    """A client with the right key that can also control the sandbox."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self.base_url = base_url
        self.root = base_url.removesuffix("/v1")
        # Without certificates: loading them takes long, and loopback needs none.
        headers = {"x-apikey": api_key}
        self.http = httpx.Client(base_url=base_url, headers=headers, timeout=30, trust_env=False, verify=False)  # noqa: S501

    def post_run(self, params: Any = ADA, waterfall: str = "email_getter", **body: Any) -> httpx.Response:
        """Post a single run; return the response."""
        return self.http.post(f"/waterfalls/{waterfall}/run", json={"params": params, **body})

    def submit(self, params: Any = ADA, waterfall: str = "email_getter", **body: Any) -> str:
        """Submit a single run that must be accepted; return its task id."""
        response = self.post_run(params, waterfall, **body)
        assert response.status_code == 200, response.text
        return str(response.json()["task_id"])

    def post_bulk(self, rows: Any, waterfall: str = "email_getter", **body: Any) -> httpx.Response:
        """Post a bulk run; return the response."""
        return self.http.post(f"/waterfalls/{waterfall}/bulk-run", json={"params": rows, **body})

    def submit_bulk(self, rows: Any, waterfall: str = "email_getter", **body: Any) -> str:
        """Submit a bulk run that must be accepted; return its task id."""
        response = self.post_bulk(rows, waterfall, **body)
        assert response.status_code == 200, response.text
        return str(response.json()["task_id"])

    def get_task(self, task_id: str, **query: str) -> httpx.Response:
        """Poll a task; return the response."""
        return self.http.get(f"/tasks/{task_id}", params=query)

    def task_body(self, task_id: str, **query: str) -> Any:
        """Return the body of a task."""
        response = self.get_task(task_id, **query)
        assert response.status_code == 200, response.text
        return response.json()

    def submit_and_get(self, params: Any = ADA, **body: Any) -> Any:
        """Submit a run and return the body of its task."""
        return self.task_body(self.submit(params, **body))

    def cancel(self, task_id: str) -> httpx.Response:
        """Cancel a task; return the response."""
        return self.http.post(f"/tasks/{task_id}/cancel")

    def balance(self) -> float:
        """Return the remaining credits."""
        return float(self.http.get("/user/me").json()["balance"])

    def audit(self, *, runs: bool = True) -> Any:
        """Return the sandbox's audit."""
        return self.http.get(f"{self.root}/__audit", params={"runs": runs}).json()

    def advance(self, seconds: float) -> Any:
        """Advance the sandbox's clock."""
        return self.http.post(f"{self.root}/__advance", json={"seconds": seconds}).json()

    def inject_fault(self, name: str, times: int = 1, scope: str = "", **params: Any) -> None:
        """Inject a fault into the next `times` matching requests."""
        body = {"name": name, "next": times, "scope": scope, "params": params}
        self.http.post(f"{self.root}/__faults", json=body).raise_for_status()


StartSandbox = Callable[..., SandboxClient]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartSandbox]:
    """Start a sandbox whose tasks are ready at once, unless the settings differ."""
    with ExitStack() as stack:

        def start_sandbox(**settings: Any) -> SandboxClient:
            chosen = SandboxSettings(**{"latency": "fixed(0)", "hit_rate": 1.0, "failure_rate": 0.0, **settings})
            state = tmp_path / f"{len(list(tmp_path.iterdir()))}.db"
            running = stack.enter_context(serve_in_thread(state, chosen))
            api = SandboxClient(running.base_url, running.api_key)
            stack.callback(api.http.close)
            return api

        yield start_sandbox


@pytest.fixture
def api(start: StartSandbox) -> SandboxClient:
    """Return a sandbox that finds everyone."""
    return start()
