"""Opens a page in headless Chromium and inspects it: DevTools protocol over a pipe, no port, no extra package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

#: The names that package managers use for it.
PROGRAM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_PATH = next((path for path in map(shutil.which, PROGRAM_NAMES) if path), None)
NOT_INSTALLED = "no Chromium on the PATH (apt-get install chromium)"

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

Scheme = Literal["light", "dark"]


@dataclass
class Browser:
    """A browser with one page; `events` are the browser's messages since the page was opened."""

    commands: IO[bytes]
    responses: IO[bytes]
    session: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    _ids: Iterator[int] = field(default_factory=itertools.count)
    _buffer: bytes = b""

    def send_command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; messages that arrive before it go to `events`."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        self.commands.write(json.dumps(command).encode() + b"\0")
        self.commands.flush()
        while (answer := self._read_message()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def open(self, page: Path, width: int, scheme: Scheme = "light", height: int = 900) -> None:
        """Open a file at a width in pixels and wait until it is loaded."""
        self.set_viewport(width, scheme, height)
        self.events.clear()
        self.send_command("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read_message())

    def set_viewport(self, width: int, scheme: Scheme = "light", height: int = 900) -> None:
        """Set another width and color scheme for the open page."""
        self.send_command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.send_command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        response = self.send_command("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in response:
            raise RuntimeError(json.dumps(response["exceptionDetails"]))
        return response["result"].get("value")

    def requests(self) -> list[str]:
        """Return the addresses that the page requested."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def console_messages(self) -> list[str]:
        """Return the page's console messages and errors."""
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Audits.issueAdded"}
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def screenshot(self, from_id: str | None, until_id: str, margin: int = 24) -> bytes:
        """Return a PNG of the page from one element (None: the top of the page) to before another, by their ids."""
        top = 0 if from_id is None else self._top_of(from_id) - margin
        width = self.evaluate("document.documentElement.clientWidth")
        clip = {"x": 0, "y": top, "width": width, "height": self._top_of(until_id) - margin - top, "scale": 1}
        screenshot_data = self.send_command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(screenshot_data["data"])

    def _top_of(self, element: str) -> int:
        return int(self.evaluate(f"document.getElementById('{element}').getBoundingClientRect().top + scrollY"))

    def pdf(self) -> bytes:
        """Return the page as a PDF."""
        return base64.b64decode(
            self.send_command("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"]
        )

    def _read_message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self.responses.fileno(), 1 << 20)
            if not piece:
                raise RuntimeError("the browser is gone")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a browser with a new profile and open an empty page in it."""
    if CHROMIUM_PATH is None:
        raise RuntimeError(NOT_INSTALLED)
    (browser_in, commands_out), (commands_in, browser_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3 and answers on 4; only a shell can assign exactly these.
        shell_command = f'exec "$@" 3<&{browser_in} 4>&{browser_out}'
        with subprocess.Popen(
            ["bash", "-c", shell_command, "bash", CHROMIUM_PATH, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(browser_in, browser_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            os.close(browser_in)
            os.close(browser_out)
            try:
                with os.fdopen(commands_out, "wb") as commands, os.fdopen(commands_in, "rb") as answers:
                    browser = Browser(commands, answers)
                    target = browser.send_command("Target.createTarget", url="about:blank")["targetId"]
                    browser.session = browser.send_command("Target.attachToTarget", targetId=target, flatten=True)[
                        "sessionId"
                    ]
                    for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
                        browser.send_command(f"{domain}.enable")
                    yield browser
            finally:
                process.kill()
