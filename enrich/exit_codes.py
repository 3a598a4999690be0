"""The exit codes: what each means, which one wins, and the command that helps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any

from msgspec import Struct

from enrich.models import RowStatus, format_credits, pluralize


class ExitCode(IntEnum):
    """The exit codes, each with its meaning in a word or two, which must not change: users' cron jobs depend on it."""

    label: str

    OK = 0, "ok"
    BUG = 1, "bug or disk"
    USAGE = 2, "wrong job"
    KEY = 3, "key rejected"
    API = 4, "API unreachable"
    REFUSED = 5, "refused"
    SOME_FAILED = 10, "some failed"
    LOCKED = 11, "locked"
    CREDITS = 12, "credits used up"
    TIME = 13, "out of time"
    IN_DOUBT = 14, "unconfirmed"
    CANARY = 15, "canary"
    INTERRUPTED = 130, "interrupted"
    TERMINATED = 143, "terminated"

    def __new__(cls, value: int, label: str = "") -> ExitCode:
        """Make a code with its label. Only the value is given to look one up."""
        code = int.__new__(cls, value)
        code._value_, code.label = value, label
        return code


#: If several exit codes apply, the first in this order wins. LOCKED (11) is raised before any other could apply.
EXIT_PRECEDENCE = (
    ExitCode.BUG,
    ExitCode.INTERRUPTED,
    ExitCode.TERMINATED,
    ExitCode.KEY,
    ExitCode.USAGE,
    ExitCode.REFUSED,
    ExitCode.CANARY,
    ExitCode.CREDITS,
    ExitCode.API,
    ExitCode.TIME,
    ExitCode.IN_DOUBT,
    ExitCode.SOME_FAILED,
    ExitCode.OK,
)


def first_exit_code(codes: Collection[ExitCode]) -> ExitCode:
    """Return the exit code if several apply: the first in EXIT_PRECEDENCE."""
    return next((code for code in EXIT_PRECEDENCE if code in codes), ExitCode.OK)


#: Exit codes with which the output is written. With any other code the old file stays.
OUTPUT_WRITING_CODES = frozenset(
    {ExitCode.OK, ExitCode.API, ExitCode.SOME_FAILED, ExitCode.CREDITS, ExitCode.TIME, ExitCode.IN_DOUBT}
)

#: No action is required: the counts show the failures of 10, and the next run continues after 13.
SUCCESS_CODES = frozenset({0, 10, 13})
#: No statement about the health of the job: another run has locked the ledger, or the user stopped this one.
NEUTRAL_CODES = frozenset({11, 130, 143})

_RUN = ("enrich run {run}",)
#: What each exit code requires, and the commands for it. `{run}` is the job with its paths, `{look}` with its ledger.
_ACTIONS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("Check the ledger, then run again", ("enrich ledger check {look}", *_RUN)),
    2: ("Correct the job or its input, then run again", _RUN),
    3: ("Set the right API key, then run again", _RUN),
    4: ("The next run resumes. To resume now", _RUN),
    5: ("Correct the cause, then run again", _RUN),
    12: ("Top up the account or raise `max_credits`, then run again", _RUN),
    14: (
        "Compare the balance, then retry (may charge again) or mark as failed",
        ("enrich reconcile {look}", "enrich run {run} --retry in_doubt", "enrich run {run} --accept in_doubt"),
    ),
    15: ("Check the first results and the mapping, then run again", ("enrich status {look}", *_RUN)),
}
#: The same for rows of each status.
_ACTIONS_BY_STATUS: dict[RowStatus, tuple[str, tuple[str, ...]]] = {
    RowStatus.FAILED: ("Retry {things} (may charge)", ("enrich run {run} --retry failed",)),
    RowStatus.EXPIRED: ("Retry {things} (charges again)", ("enrich run {run} --retry expired",)),
    RowStatus.IN_DOUBT: ("{things} may have been charged. " + _ACTIONS[14][0], _ACTIONS[14][1]),
}
_COMMAND_OF_JOB = re.compile(r"enrich (\w+) JOB\b")
_FAILURES = (RowStatus.FAILED, RowStatus.EXPIRED)


def exit_label(code: int) -> str:
    """Return what an exit code means in a word or two."""
    return next((each.label for each in ExitCode if each == code), "unknown")


def requires_action(code: int) -> bool:
    """Return whether the exit code requires an action."""
    return code not in SUCCESS_CODES | NEUTRAL_CODES


class JobArguments(Struct, frozen=True):
    """The job as arguments of a shell command: of `enrich run`, and of commands that only read the ledger."""

    run_args: str
    ledger_args: str

    def in_hint(self, hint: str) -> str:
        """Return a text whose commands name the job instead of JOB."""
        arguments = {"run": self.run_args, "plan": self.run_args, "collect": self.run_args}
        arguments["cron"] = shlex.join(shlex.split(self.ledger_args)[:1])  # `enrich cron` copies ENRICH_LEDGER
        return _COMMAND_OF_JOB.sub(lambda found: f"enrich {found[1]} {arguments.get(found[1], self.ledger_args)}", hint)


class RequiredAction(Struct, frozen=True):
    """An action that is required, and the exact commands for it."""

    text: str
    commands: tuple[str, ...]


def required_actions(
    code: int, rows: Mapping[str, Any], target: JobArguments, noun: str = "lead"
) -> list[RequiredAction]:
    """Return the required actions for an exit code and for the number of rows (or of another `noun`) by status.

    With `steps`, the results that failed or expired in each step are counted: their rows may be found.
    """
    actions: list[tuple[str, tuple[str, ...]]] = []
    steps = rows.get("steps")
    counts = {status: rows.get(status) for status in _ACTIONS_BY_STATUS}
    if steps:
        counts |= {status: sum(step[status] or 0 for step in steps) for status in _FAILURES}
    if code == ExitCode.CREDITS and "--new-ledger" in (hint := rows.get("hint") or ""):
        # No money is missing: another ledger has paid for what a later step would send.
        actions.append((hint, ("enrich run {run} --new-ledger",)))
    elif code == ExitCode.SOME_FAILED and all(counts[status] == 0 for status in _FAILURES):
        text = "Some requests failed; their leads keep the last match or are not in the input. Retry them (may charge)"
        actions.append((text, ("enrich run {run} --retry failed,expired",)))
    elif code in _ACTIONS and not (code == ExitCode.IN_DOUBT and rows.get(RowStatus.IN_DOUBT)):
        actions.append(_ACTIONS[code])
    if credits_over_cap := rows.get("credits_over_cap"):
        overrun = format_credits(credits_over_cap)
        text = f"The run spent {overrun} credits over the cap, because a price rose. See the current prices"
        actions.append((text, ("enrich plan {run}",)))
    for status, (text, commands) in _ACTIONS_BY_STATUS.items():
        word = f"{status.value} result" if steps else f"{status.value} {noun}"
        if status is RowStatus.IN_DOUBT:
            word = f"unconfirmed {noun}"
        if count := counts[status]:
            things = f"the {word}" if count == 1 else pluralize(count, word)
            sentence = text.format(things=things)
            actions.append((sentence[0].upper() + sentence[1:], commands))
    return [
        RequiredAction(text, tuple(each.format(run=target.run_args, look=target.ledger_args) for each in commands))
        for text, commands in actions
    ]


def format_actions(actions: Iterable[RequiredAction]) -> Iterator[str]:
    """Yield the actions as lines. A single command is on the line of its text."""
    for action in actions:
        if len(action.commands) == 1:
            yield f"{action.text}: {action.commands[0]}"
        else:
            yield f"{action.text}:" if action.commands else action.text
            yield from (f"  {command}" for command in action.commands)
