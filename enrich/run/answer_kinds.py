"""Groups answers by what is counted of them: a million answers have few kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

from enrich.databar.task_results import MAX_STEPS, ParsedData, parse_data
from enrich.job.cell_text import is_blank
from enrich.json_text import parse_json
from enrich.models import SettledAttempt, State

#: Kinds that are held at once. Beyond these, answers of one kind are counted in several parts.
MAX_KINDS = 20_000


# Not tracked by the garbage collector: that would take as long as parsing.
class Step(msgspec.Struct, frozen=True, gc=False):
    """A provider that a waterfall called, or a verifier. None: the answer has no text or number there."""

    provider: str
    action: str | int | float | None = None
    cost: str | int | float | None = None


class AnswerKind(NamedTuple):
    """The properties of a settled attempt that count."""

    execution: int
    #: The step of the job; None: the job has none.
    step: str | None
    state: str
    call: str
    erased: int
    paid: int | None
    #: The provider of the answer; None for a flat one.
    provider: str | None
    #: Whether the answer is a match and is stored (not purged).
    stored_match: bool
    #: The status of the task.
    status: str | None
    #: What the caller returned for a stored match.
    fields: tuple[str, ...]
    #: The steps with a provider.
    steps: tuple[Step, ...]
    #: The names of the params of an answer without such steps.
    sent: tuple[str, ...]


class _UsualData(msgspec.Struct, gc=False):
    result: dict[str, Any]
    steps: Annotated[tuple[Step, ...], msgspec.Meta(max_length=MAX_STEPS)]


class _UsualTask(msgspec.Struct, gc=False):
    """The usual answer: one wrapper with steps. Other fields are checked, but not kept."""

    data: tuple[_UsualData] | _UsualData
    status: str | None = None


_USUAL_TASKS = msgspec.json.Decoder(_UsualTask)


def count_kinds(
    attempts: Iterable[SettledAttempt],
    read_match: Callable[[int, ParsedData], tuple[str, ...]] = lambda *_: (),
    *,
    read_whole: bool = False,
) -> Iterator[tuple[AnswerKind, int]]:
    """Group settled attempts by kind, and count them. A kind may come in several parts.

    `read_match` gets the run and the data of each stored match, and returns the `fields` of its kind. The data is only
    its fields, unless `read_whole`.
    """
    kinds: Counter[tuple[object, ...]] = Counter()
    for execution, state, call, params, paid, answer, erased, step, stored_provider in attempts:
        status, parsed, steps = (None if read_whole else _read_usual(answer, stored_provider)) or _read_any(
            answer, stored_provider
        )
        stored_match = answer is not None and state == State.FOUND
        fields = read_match(execution, parsed) if stored_match else ()
        sent = () if steps else tuple(msgspec.json.decode(params))
        kinds[
            execution, step, state, call, erased, paid, parsed.provider, stored_match, status, fields, steps, sent
        ] += 1
        if len(kinds) > MAX_KINDS:
            yield from _named(kinds)
            kinds.clear()
    yield from _named(kinds)


def _named(kinds: Counter[tuple[object, ...]]) -> Iterator[tuple[AnswerKind, int]]:
    return ((AnswerKind._make(values), number) for values, number in kinds.items())


def _read_usual(answer: str | None, provider: str | None) -> tuple[str | None, ParsedData, tuple[Step, ...]] | None:
    """Return status, fields and steps of a usual answer; None: it is another, or a step has no provider."""
    try:
        task = _USUAL_TASKS.decode(answer or "")
    except (msgspec.DecodeError, RecursionError):
        return None
    data = task.data if isinstance(task.data, _UsualData) else task.data[0]
    if any([is_blank(step.provider) for step in data.steps]):  # noqa: C419 - a generator takes longer
        return None
    return task.status, ParsedData(data.result, provider), data.steps


def _read_any(answer: str | None, provider: str | None) -> tuple[str | None, ParsedData, tuple[Step, ...]]:
    task = load_task(answer)
    status, parsed = task.get("status"), parse_data(task.get("data"), provider, find_provider=False)
    steps = tuple(
        Step(provider, _scalar(step.get("action")), _scalar(step.get("cost")))
        for step in parsed.steps
        if isinstance(provider := step.get("provider"), str) and not is_blank(provider)
    )
    return status if isinstance(status, str) else None, parsed, steps


def _scalar(value: Any) -> str | int | float | None:  # noqa: ANN401 - a JSON field can be any type
    """Return a text or number; None for anything else: it is no price, and may have no hash."""
    return value if value.__class__ in {str, int, float} else None


def load_task(answer: str | None) -> Mapping[str, Any]:
    """Read a task as the ledger stores it; empty when there is none or it cannot be read."""
    try:
        task = parse_json(answer or "{}")
    except (ValueError, RecursionError):
        return {}
    return task if isinstance(task, dict) else {}
