"""Makes the pictures of the README: `python -m tests.pictures`. They show what the sandbox sold, and nobody's leads."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.chromium import Scheme, browsing
from tests.documents import ROOT, lay_out, run

#: Name, colour scheme, the heading it begins with (None: the top of the page) and the first that is beyond it.
PICTURES: tuple[tuple[str, Scheme, str | None, str], ...] = (
    ("report-light", "light", None, "rows"),
    ("report-dark", "dark", "rows", "speed"),
)
WIDTH = 1024


def main() -> None:
    """Run the demo and the week, and look at their reports."""
    with tempfile.TemporaryDirectory() as folder, browsing() as browser:
        checkout, week = lay_out(Path(folder)), Path(folder) / "week"
        run("make demo", checkout)
        subprocess.run([sys.executable, ROOT / "examples" / "week.py", "--folder", week], check=True)
        pages = checkout / "out" / "leads_report.html", week / "report.html"
        for page, (name, scheme, first, beyond) in zip(pages, PICTURES, strict=True):
            browser.open(page, WIDTH, scheme)
            browser.evaluate(f"document.body.innerHTML = document.body.innerHTML.replaceAll('{folder}', '/srv')")
            (ROOT / "docs" / f"{name}.png").write_bytes(browser.picture(first, beyond))


if __name__ == "__main__":
    main()
