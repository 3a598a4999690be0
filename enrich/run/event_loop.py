"""The event loop of a run: uvloop where it is installed (extra `fast`), otherwise that of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_event_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in a new event loop."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - optional, and not needed by commands that run nothing
    except ImportError:
        return None
    return uvloop.new_event_loop
