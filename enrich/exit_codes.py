"""What an exit code means for those who watch: its word, whether it is fine, and the command that helps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from enrich.models import RowStatus, format_credits, pluralize

#: Exit 15, the canary, belongs to the pipeline; here it is only told.
EXIT_LABELS = {
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

_IN_DOUBT_CODE = 14

#: The leads are enriched as far as it goes tonight: 10 is told by its counts, 13 goes on by itself.
SUCCESS_CODES = frozenset({0, 10, 13})
#: Says nothing about this job's nights: another run is at work (it will tell), or somebody stopped this one.
NEUTRAL_CODES = frozenset({11, 130, 143})

#: The commands that help, by exit code; {run} is the job with all its paths, {look} with its ledger only.
_COMMANDS = {
    1: ("enrich ledger check {look}", "enrich run {run}"),
    2: ("enrich run {run}",),
    3: ("enrich run {run}",),
    4: ("enrich run {run}",),
    5: ("enrich run {run}",),
    12: ("enrich run {run}",),
    14: ("enrich reconcile {look}", "enrich run {run} --retry in_doubt", "enrich run {run} --accept in_doubt"),
    15: ("enrich status {look}", "enrich run {run}"),
}
_INSTRUCTIONS = {
    1: "nothing that is known is lost; look, then go on",
    2: "mend the job or its input, then",
    3: "put the right key in its place, then",
    4: "the next run goes on; to go on now",
    5: "mend what the error says, then",
    12: "top up the account or raise `max_credits`, then",
    14: "see what it may have cost; then ask again (may pay twice) or take it for lost",
    15: "look at the first answers and the mapping; then",
}


def exit_label(code: int) -> str:
    """Say what an exit code means in a word or two."""
    return EXIT_LABELS.get(code, "unknown")


def outcome_label(code: int | None, *, is_running: bool | None) -> str:
    """Say how an execution ended; one without an exit code is at work, or was killed (None: nobody knows which)."""
    if code is not None:
        return exit_label(code)
    return {True: "at work now", False: "killed", None: "at work, killed"}[is_running]


def requires_action(code: int) -> bool:
    """Tell whether somebody should look."""
    return code not in SUCCESS_CODES | NEUTRAL_CODES


@dataclass(frozen=True, slots=True)
class JobArguments:
    """The job as the shell takes it: after `enrich run`, and after commands that only look."""

    run_args: str
    ledger_args: str


@dataclass(frozen=True, slots=True)
class RequiredAction:
    """What waits for a person, and the exact commands that help."""

    text: str
    commands: tuple[str, ...]


#: What rows of a status need, and the exit code whose commands help; without one the run asks them again.
_ACTIONS_BY_STATUS: dict[RowStatus, tuple[str, tuple[str, ...]]] = {
    RowStatus.IN_DOUBT: (f"in doubt: {_INSTRUCTIONS[14]}", _COMMANDS[14]),
    RowStatus.FAILED: ("failed: ask again (costs again)", ("enrich run {run} --retry failed",)),
    RowStatus.EXPIRED: ("expired: ask again (costs again)", ("enrich run {run} --retry expired",)),
}


def required_actions(
    code: int, rows: Mapping[str, Any], target: JobArguments, noun: str = "row"
) -> list[RequiredAction]:
    """Tell what to do, and the exact commands: for an exit code, and for rows (or `what` is counted) by status."""
    actions = []
    if code in _COMMANDS and not (code == _IN_DOUBT_CODE and rows.get(RowStatus.IN_DOUBT)):
        actions.append((_INSTRUCTIONS[code], _COMMANDS[code]))
    if credits_over_cap := rows.get("credits_over_cap"):
        text = f"the credits cap was overrun by {format_credits(credits_over_cap)}, because a price rose: look at the prices"
        actions.append((text, ("enrich plan {run}",)))
    for status, (text, commands) in _ACTIONS_BY_STATUS.items():
        if count := rows.get(status):
            actions.append((f"{pluralize(count, noun)} {text}", commands))
    return [
        RequiredAction(text, tuple(each.format(run=target.run_args, look=target.ledger_args) for each in commands))
        for text, commands in actions
    ]


def format_actions(actions: Iterable[RequiredAction]) -> list[str]:
    """Write needs as lines."""
    return [
        line for action in actions for line in (f"{action.text}:", *(f"  {command}" for command in action.commands))
    ]
