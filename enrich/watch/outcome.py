"""What an exit code means for those who watch: its word, whether it is fine, and the command that helps."""

from __future__ import annotations

from dataclasses import dataclass

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


def advice(code: int, target: Target) -> list[str]:
    """Tell what to do, and the exact commands."""
    if code not in _HELP:
        return []
    commands = [command.format(run=target.run, look=target.look) for command in _HELP[code]]
    return [f"{_FIRST[code]}:", *(f"  {command}" for command in commands)]
