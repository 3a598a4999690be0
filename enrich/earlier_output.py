"""Finds out whether an earlier output was paid for from another ledger: a new one would pay for its leads again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path

from enrich.errors import EnrichError, Refused
from enrich.job import Job
from enrich.place import LedgerPlace, Place, Url, beside, for_sandbox, is_dataset, locate
from enrich.spec import Input
from enrich.store.database import exists
from enrich.store.dialect import FAILURES
from enrich.store.journal import Journal
from enrich.store.ledger import Ledger
from enrich.store.sqlite import unknown_to_sandbox
from enrich.tables import storage
from enrich.tables.cells import as_text
from enrich.tables.source import Source
from enrich.tables.textfile import TableProblem

#: `enrich_task_id`, and with steps one for each.
_TASK_ID = re.compile(r"enrich_(?:[a-z][a-z0-9_]*_)?task_id")
#: What strftime codes stand for in a name; a code that is not here may stand for anything.
_CODES = {"Y": r"\d{4}", "y": r"\d\d", "j": r"\d{3}", "%": "%"} | dict.fromkeys("mdHMSIUWVuw", r"\d{1,2}")


async def paid_elsewhere(
    job: Job, journal: Journal, asking: Callable[[], AbstractContextManager[object]]
) -> tuple[Place | None, str | None]:
    """Look for an earlier output with tasks that the ledger does not have; None: there is none.

    Beside it a note when the output cannot be read. `asking` lets a signal end what takes long.
    """
    output: Place | None = None
    try:
        with asking():
            output = _newest(job)
            batches = iter(()) if output is None else _tasks(job, output)
        while True:
            with asking():
                tasks = next(batches, None)
            if tasks is None:
                return None, None
            unknown = await journal.do(Ledger.unknown_tasks, tasks)
            if unknown and _unknown_to_sandbox(job.ledger, unknown):
                return output, None
    except (Refused, TableProblem, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else error.message
        return None, f"whether an earlier output was paid for from another ledger is not known: {said}"


def _unknown_to_sandbox(ledger: LedgerPlace, tasks: Iterable[str]) -> list[str]:
    """Leave out the tasks of the sandbox, as its ledger and its own state know them."""
    place, unknown = for_sandbox(ledger), list(tasks)
    with suppress(EnrichError, *FAILURES):
        if exists(place):
            with closing(Ledger(place, read_only=True)) as other:
                unknown = other.unknown_tasks(unknown)
    state = place.with_suffix(".api.db") if isinstance(place, Path) else beside(place, ".api.db")
    return unknown_to_sandbox(state, unknown)


def _tasks(job: Job, output: Place) -> Iterator[list[str]]:
    """Yield the task ids of an output, batch by batch. Raises Refused when it cannot be read."""
    path = f"{output}/" if is_dataset(output) and not str(output).endswith("/") else str(output)
    told: dict[str, object] = {"path": path}
    if job.output.path.lower().endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
        told |= {"separator": job.output.separator, "encoding": job.output.encoding}
    source = Source(output, Input.model_validate(told))
    columns = [name for name in source.schema if _TASK_ID.fullmatch(name)]
    for frame in source.batches() if columns else ():
        for name in columns:
            if tasks := [str(task) for task in as_text(frame.get_column(name)).unique() if task]:
                yield tasks


def _newest(job: Job) -> Place | None:
    """Find the newest output of the job, of any date, that is not also its input."""
    named = locate(job.output_base, job.output.path)
    if isinstance(named, Url):
        return _newest_object(named)
    found: list[tuple[float, Path]] = []
    for path in _matching(named):
        with suppress(OSError):
            status = path.stat()
            if path.is_dir() == is_dataset(named) and (path.is_dir() or path.is_file()):
                found.append((status.st_mtime, path))
    apart = [each for each in found if not _is_input(job, each[1])]
    return max(apart)[1] if apart else None


def _is_input(job: Job, path: Path) -> bool:
    return isinstance(job.input_path, Path) and os.path.realpath(job.input_path) == os.path.realpath(path)


def _matching(named: Path) -> list[Path]:
    """Find the files that a name with strftime codes may stand for."""
    found = [Path(named.anchor)]
    for part in named.parts[1:]:
        if "%" not in part:
            found = [path / part for path in found]
            continue
        pattern = _pattern(part)
        further = []
        for path in found:
            with suppress(OSError):
                further += [path / name for name in os.listdir(path) if pattern.fullmatch(name)]  # noqa: PTH208
        found = further
    return found


def _pattern(part: str) -> re.Pattern[str]:
    pieces = re.split(r"%[-_0^#EO]?(.)", part)
    return re.compile(
        "".join(re.escape(piece) if not number % 2 else _CODES.get(piece, ".+") for number, piece in enumerate(pieces)),
        re.DOTALL,
    )


def _newest_object(named: Url) -> Url | None:
    """Find the newest object; where the name has codes, the last by name, which dates sort by."""
    if "%" not in named.key:
        return named if named.is_folder or storage.stamp(named) is not None else None
    first, _, _ = named.key.partition("%")
    folder = first.rpartition("/")[0]
    below = Url(named.scheme, named.bucket, f"{folder}/" if folder else "")
    pattern = re.compile("/".join(_pattern(part).pattern for part in named.key.split("/")), re.DOTALL)
    keys = [key for key, _ in storage.below(below) if pattern.fullmatch(key)]
    return Url(named.scheme, named.bucket, max(keys)) if keys else None
