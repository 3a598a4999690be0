"""Replaces the renderer of the report: drawing a page takes a second of processor time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

from enrich.report.data import Report


@contextmanager
def fake_renderer(page: str = "<html>drawn</html>", error: BaseException | None = None) -> Iterator[None]:
    """Return this page or raise this error, for any report of this process."""
    module = ModuleType("enrich.report.render")

    def render(report: Report) -> str:
        assert isinstance(report, Report)
        if error is not None:
            raise error
        return page

    module.render_report = render  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"enrich.report.render": module}):
        yield
