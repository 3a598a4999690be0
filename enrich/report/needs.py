"""What waits for a person, with the exact command for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from enrich.report.facts import Need, Night
from enrich.watch.outcome import FINE, Target, advice, word

#: States in which only a person can help, and what may be done: text and command, for `{run}` and `{look}`.
_WAITS = {
    "failed": (("failed: ask again, at a price", "enrich run {run} --retry failed"),),
    "expired": (("expired before they were fetched: ask again, at a price", "enrich run {run} --retry expired"),),
    "in_doubt": (
        ("in doubt, perhaps charged: see what they may have cost", "enrich reconcile {look}"),
        ("in doubt: ask again, which may pay twice", "enrich run {run} --retry in_doubt"),
        ("in doubt: or take them for lost", "enrich run {run} --accept in_doubt"),
    ),
}


def needs(last: Night | None, counts: Mapping[str, int], what: str, told_in: str, target: Target) -> Iterator[Need]:
    """Yield what waits, the last night first.

    `counts` are rows by status, or requests by state where the input can't be read; `what` says which of both.
    `told_in` is the file that says why a row is invalid.
    """
    yield from _of_night(last, target)
    for state, ways in _WAITS.items():
        if number := counts.get(state, 0):
            for text, command in ways:
                yield Need(f"{_count(number, what)} {text}", command.format(run=target.run, look=target.look))
    if number := counts.get("invalid", 0):
        yield Need(f"{_count(number, what)} invalid, so never sent: {told_in} says why", None)


def _of_night(last: Night | None, target: Target) -> Iterator[Need]:
    if last is None:
        return
    if last.outcome == "killed":
        yield Need(f"execution {last.execution} was killed: the next run goes on", f"enrich run {target.run}")
    elif last.exit_code is not None and last.exit_code not in FINE | {14}:
        # What a doubt needs is told with its rows.
        first, *commands = advice(last.exit_code, target) or (f"{word(last.exit_code)}:", f"enrich run {target.run}")
        text = f"execution {last.execution} ended with exit {last.exit_code} ({word(last.exit_code)}): {first}"
        for command in commands:
            yield Need(text.removesuffix(":"), command.strip())
            text = "then"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what if number == 1 else what + 's'}"
