"""Makes the README's screenshots, with invented leads: `python -m tests.support.screenshots`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.browser import Scheme, open_browser
from tests.support.documents import ROOT, make_checkout, run_shell

#: Name, color scheme, the first heading shown (None: the top of the page) and the heading below the screenshot.
SCREENSHOTS: tuple[tuple[str, Scheme, str | None, str], ...] = (
    ("report-light", "light", None, "rows"),
    ("report-dark", "dark", "rows", "timing"),
)
WIDTH = 1024


def main() -> None:
    """Run the demo and the example week, and take screenshots of their reports."""
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        checkout, week = make_checkout(Path(folder)), Path(folder) / "week"
        run_shell("make demo", checkout)
        subprocess.run([sys.executable, ROOT / "examples" / "week.py", "--folder", week], check=True)
        pages = checkout / "out" / "leads_report.sandbox.html", week / "report.html"
        for page, (name, scheme, from_id, until_id) in zip(pages, SCREENSHOTS, strict=True):
            browser.open(page, WIDTH, scheme)
            (ROOT / "docs" / f"{name}.png").write_bytes(browser.screenshot(from_id, until_id))


if __name__ == "__main__":
    main()
