"""What an exit code means for those who watch: its word, whether it is fine, and the command that helps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from enrich.model import RowStatus, many, write_credits

#: Exit 15, the canary, belongs to the pipeline; here it is only told.
WORDS = {
    0: "ok",
    1: "bug or disk",
    2: "wrong job",
    3: "key refused",
    4: "API unreachable",
    5: "refused",
    10: "some failed",
    11: "locked",
    12: "out of credits",
    13: "out of time",
    14: "in doubt",
    15: "canary",
    130: "interrupted",
    143: "terminated",
}

_DOUBT = 14

#: The leads are enriched as far as it goes tonight: 10 is told by its counts, 13 goes on by itself.
FINE = frozenset({0, 10, 13})
#: Says nothing about this job's nights: another run is at work (it will tell), or somebody stopped this one.
SILENT = frozenset({11, 130, 143})

#: The commands that help, by exit code; {run} is the job with all its paths, {look} with its ledger only.
_HELP = {
    1: ("enrich ledger check {look}", "enrich run {run}"),
    2: ("enrich run {run}",),
    3: ("enrich run {run}",),
    4: ("enrich run {run}",),
    5: ("enrich run {run}",),
    12: ("enrich run {run}",),
    14: ("enrich reconcile {look}", "enrich run {run} --retry in_doubt", "enrich run {run} --accept in_doubt"),
    15: ("enrich status {look}", "enrich run {run}"),
}
_FIRST = {
    1: "nothing that is known is lost; look, then go on",
    2: "mend the job or its input, then",
    3: "put the right key in its place, then",
    4: "the next run goes on; to go on now",
    5: "mend what the error says, then",
    12: "top up the account or raise `max_credits`, then",
    14: "see what it may have cost; then ask again (may pay twice) or take it for lost",
    15: "look at the first answers and the mapping; then",
}


def word(code: int) -> str:
    """Say what an exit code means in a word or two."""
    return WORDS.get(code, "unknown")


def ending(code: int | None, *, at_work: bool | None) -> str:
    """Say how an execution ended; one without an exit code is at work, or was killed (None: nobody knows which)."""
    if code is not None:
        return word(code)
    return {True: "at work now", False: "killed", None: "at work, killed"}[at_work]


def needs_a_person(code: int) -> bool:
    """Tell whether somebody should look."""
    return code not in FINE | SILENT


@dataclass(frozen=True, slots=True)
class Target:
    """The job as the shell takes it: after `enrich run`, and after commands that only look."""

    run: str
    look: str


@dataclass(frozen=True, slots=True)
class Need:
    """What waits for a person, and the exact commands that help."""

    text: str
    commands: tuple[str, ...]


#: What rows of a status need, and the exit code whose commands help; without one the run asks them again.
_OF_ROWS: dict[RowStatus, tuple[str, tuple[str, ...]]] = {
    RowStatus.IN_DOUBT: (f"in doubt: {_FIRST[14]}", _HELP[14]),
    RowStatus.FAILED: ("failed: ask again (costs again)", ("enrich run {run} --retry failed",)),
    RowStatus.EXPIRED: ("expired: ask again (costs again)", ("enrich run {run} --retry expired",)),
}


def needs(code: int, rows: Mapping[str, Any], target: Target, what: str = "row") -> list[Need]:
    """Tell what to do, and the exact commands: for an exit code, and for rows (or `what` is counted) by status."""
    found = []
    if code in _HELP and not (code == _DOUBT and rows.get(RowStatus.IN_DOUBT)):
        found.append((_FIRST[code], _HELP[code]))
    if over := rows.get("credits_over_cap"):
        text = f"the credits cap was overrun by {write_credits(over)}, because a price rose: look at the prices"
        found.append((text, ("enrich plan {run}",)))
    for status, (text, commands) in _OF_ROWS.items():
        if count := rows.get(status):
            found.append((f"{many(count, what)} {text}", commands))
    return [
        Need(text, tuple(each.format(run=target.run, look=target.look) for each in commands))
        for text, commands in found
    ]


def advice(needed: Iterable[Need]) -> list[str]:
    """Write needs as lines."""
    return [line for need in needed for line in (f"{need.text}:", *(f"  {command}" for command in need.commands))]
