"""Table-driven tests, and the choice of the cases that run with the quick tests.

Tables of small cases are one test, because pytest's overhead per test exceeds the time of most cases. Of slow cases,
a few run with the quick tests and all others with the long ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

#: The Hypothesis examples of each property in the profile of the long tests.
FULL = 60
#: The type of `pytest.param`.
PARAM = type(pytest.param())
Test = Callable[..., None]


def in_turn(
    names: str | Sequence[str], cases: Iterable[Any], *, ids: Iterable[str] | Callable[[Any], object] | None = None
) -> Callable[[Test], Test]:
    """Run a test with each case, written as for `pytest.mark.parametrize`; all cases run, and failed ones are named.

    Each case has a new folder as `tmp_path`; a case's `monkeypatch` is undone after it.
    """
    named = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    single = isinstance(names, str) and len(named) == 1
    table = [
        case if isinstance(case, PARAM) else _param(case if single else tuple(case), single=single) for case in cases
    ]
    labels = [str(case.id or _label(ids, case.values)) for case in table]
    if ids is not None and not callable(ids):
        labels = list(ids)
    assert table
    assert len(labels) == len(table)
    assert all(len(case.values) == len(named) and not case.marks for case in table)

    def decorate(test: Test) -> Test:
        assert not inspect.iscoroutinefunction(test)

        @wraps(test)
        def run_all(*args: Any, **fixtures: Any) -> None:
            __tracebackhide__ = True
            first: BaseException | None = None
            failed: list[str] = []
            for number, (label, case) in enumerate(zip(labels, table, strict=True)):
                try:
                    _run(test, args, fixtures, number, dict(zip(named, case.values, strict=True)))
                except pytest.skip.Exception as skip:
                    raise AssertionError(f"{label}: a case of a table cannot be skipped") from skip
                except (Exception, pytest.fail.Exception) as failure:  # noqa: BLE001 - raised after all cases
                    first = first or failure
                    failed.append(f"  {label}: {type(failure).__name__}")
            if first is not None:
                first.add_note(
                    "\n".join([f"{len(failed)} of {len(table)} cases fail; the first is shown above:", *failed])
                )
                raise first

        signature = inspect.signature(test)
        kept = [parameter for name, parameter in signature.parameters.items() if name not in named]
        assert len(kept) == len(signature.parameters) - len(named), f"{test.__name__} does not take {named}"
        run_all.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined] # pytest reads it
        return run_all

    return decorate


def first_quick(count: int, cases: Iterable[Any], *, single: bool = False) -> list[Any]:
    """Mark all but the first cases of a slow test as long. With `single`, a tuple is one value, not several."""
    params = [
        case
        if isinstance(case, PARAM)
        else pytest.param(*(case if isinstance(case, tuple) and not single else (case,)))
        for case in cases
    ]
    later = [pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.long]) for case in params[count:]]
    return params[:count] + later


def _param(case: Any, *, single: bool) -> Any:
    return pytest.param(*case) if isinstance(case, tuple) and not single else pytest.param(case)


def examples(full: int) -> int:
    """Return the profile's number of Hypothesis examples where the whole suite runs `full`."""
    return max(3, full * settings().max_examples // FULL)


def _label(ids: object, values: Sequence[object]) -> str:
    text = "-".join(str(ids(value)) for value in values) if callable(ids) else ", ".join(map(repr, values))
    return text if len(text) <= 300 else text[:300] + "…"


def _run(test: Test, args: tuple[Any, ...], fixtures: dict[str, Any], number: int, case: dict[str, Any]) -> None:
    __tracebackhide__ = True
    folder = fixtures.get("tmp_path")
    if isinstance(folder, Path):
        fixtures = fixtures | {"tmp_path": folder / str(number)}
        fixtures["tmp_path"].mkdir()
    if "monkeypatch" not in fixtures:
        test(*args, **fixtures, **case)
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        test(*args, **(fixtures | {"monkeypatch": monkeypatch}), **case)
