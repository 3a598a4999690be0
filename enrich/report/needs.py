"""What waits for a person, with the exact commands for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from enrich.errors import Exit
from enrich.model import many
from enrich.report.facts import Night
from enrich.watch.outcome import FINE, Need, Target, needs, word


def waiting(last: Night | None, counts: Mapping[str, int], what: str, told_in: str, target: Target) -> Iterator[Need]:
    """Yield what waits, the last night first.

    `counts` are rows by status, or requests by state where the input can't be read; `what` says which of both.
    `told_in` is the file that says why a row is invalid.
    """
    if last is not None:
        yield from _of_night(last, target, doubts=bool(counts.get("in_doubt")))
    yield from needs(0, counts, target, what)
    if number := counts.get("invalid", 0):
        yield Need(f"{many(number, what)} invalid, so never sent: {told_in} says why", ())


def _of_night(last: Night, target: Target, *, doubts: bool) -> Iterator[Need]:
    code = last.exit_code
    if last.outcome == "killed":
        yield Need(f"execution {last.execution} was killed: the next run goes on", (f"enrich run {target.run}",))
    elif code is not None and code not in FINE and not (code == Exit.IN_DOUBT and doubts):  # that is told with its rows
        ended = f"execution {last.execution} ended with exit {code} ({word(code)})"
        others = [Need("go on", (f"enrich run {target.run}",))]
        yield from (replace(need, text=f"{ended}: {need.text}") for need in needs(code, {}, target) or others)
