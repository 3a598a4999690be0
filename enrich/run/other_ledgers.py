"""Finds leads that another ledger has paid for, and files of real runs, which no sandbox run may replace.

A new ledger pays for its leads again when an earlier output, or another ledger in its folder, has paid for them: a
copied, renamed or re-pointed job. Such a run is refused, unless the user agrees.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from enrich.errors import CommandRefused, RunCancelled, RunDeclined
from enrich.files import object_store
from enrich.files.csv_format import read_resaved_cells
from enrich.files.input_files import InputFile, LocalCopies
from enrich.files.reader import InputTable
from enrich.files.values import as_text
from enrich.job.document import yaml_scalar
from enrich.job.job import Job
from enrich.job.local_files import is_same_file
from enrich.job.locations import (
    LedgerLocation,
    Location,
    ObjectUrl,
    PostgresLocation,
    format_of,
    is_dataset,
    is_sandbox_file_name,
    parse_location,
    real_ledger_location,
    sandbox_file_name,
    sandbox_ledger_location,
    sandbox_state_path,
)
from enrich.job.spec import Input
from enrich.ledger import erasure, neighbour_ledgers, records, step_results, transitions
from enrich.ledger.database import Database, try_read
from enrich.ledger.neighbour_ledgers import Overlap, find_ledger_files
from enrich.models import pluralize
from enrich.run.context import RunContext
from enrich.run.run_state import RunState
from enrich.run.step_rows import StepRows
from enrich.sandbox.store import unknown_tasks

_TASK_ID = "enrich_task_id"
#: With steps, an output has one column per step instead.
_STEP_TASK_ID = re.compile(r"enrich_[a-z][a-z0-9_]*_task_id")
#: What the strftime codes in a name match. A code that is not listed matches anything.
_STRFTIME_PATTERNS = {"Y": r"\d{4}", "y": r"\d\d", "j": r"\d{3}", "%": "%"} | dict.fromkeys("mdHMSIUWVuw", r"\d{1,2}")
#: Minimum number and share of the paid requests with which a run is refused. Jobs may share a few leads.
MIN_REQUESTS, MIN_SHARE = 10, 0.01
#: Seconds for the comparison.
COMPARE_TIMEOUT_S = 20.0


async def find_output_of_other_ledger(
    job: Job,
    submit: Callable[..., Awaitable[Any]],
    interruptible: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[CommandRefused | None, str | None]:
    """Look for an earlier output with tasks that the ledger does not have. Returns the refusal; None: there is none.

    The second value is a note when the ledger is new and the output cannot be read. An output that was changed after
    the last run of the ledger, and has tasks of this ledger beside others, was written with a newer copy of it.
    `submit` runs a function with the ledger. `interruptible` lets a signal end slow steps.
    """
    output: Location | None = None
    known_count, unknown_counts = 0, Counter[str]()
    last_run_ms: int | None = await submit(records.last_run_ms)
    try:
        with interruptible():
            output = _newest_output(job, last_run_ms)
            batches = iter(()) if output is None else _read_task_ids(job, output)
        while True:
            with interruptible():
                tasks = next(batches, None)
            if tasks is None:
                break
            unknown: list[str] = await submit(transitions.unknown_task_ids, tasks)
            known_count += len(tasks) - len(unknown)
            unknown_counts.update(_without_sandbox_tasks(sandbox_ledger_location(job.ledger), unknown))
            if unknown_counts and last_run_ms is None:
                paid = (
                    f"{output} was paid for from another ledger. The new ledger {job.ledger} pays for its leads again"
                )
                hint = "set `ledger:` to the one that paid, or restore it; or pay again with --new-ledger"
                ledger = _ledger_with_tasks(job, output, unknown)
                return CommandRefused(paid, hint if ledger is None else _hint_to_share(job, ledger)), None
    except (CommandRefused, OSError) as error:
        if last_run_ms is not None:
            return None, None
        message = error.strerror if isinstance(error, OSError) else error.message
        return None, f"cannot check whether another ledger paid for an earlier output: {message}"
    if (
        known_count
        and unknown_counts.total() >= MIN_REQUESTS
        and len(unknown_counts) > await submit(erasure.forgotten_task_count)
    ):
        message = (
            f"{output} has tasks that {job.ledger} does not have: a newer copy of this ledger paid for them, "
            "and this one pays for their leads again"
        )
        return CommandRefused(message, "restore the newest copy; or pay again with --new-ledger"), None
    return None, None


def _ledger_with_tasks(job: Job, output: Location | None, tasks: list[str]) -> Path | None:
    """Find the ledger file that has some of these tasks, near the job or its output."""
    near_output = find_ledger_files(output.parent / ".enrich") if isinstance(output, Path) else []
    for ledger in (path for path in (*_real_ledgers(job), *near_output) if isinstance(path, Path)):
        unknown = try_read(ledger, lambda db: transitions.unknown_task_ids(db, tasks))
        if unknown is not None and len(unknown) < len(tasks):
            return ledger
    return None


def _hint_to_share(job: Job, ledger: Path) -> str:
    shared = yaml_scalar(os.path.relpath(ledger, job.document.folder))
    return f"share its results with `ledger: {shared}` in the job file, or pay again with --new-ledger"


def _without_sandbox_tasks(sandbox_ledger: LedgerLocation, tasks: list[str]) -> list[str]:
    """Leave out the tasks of the sandbox, which are in its ledger or in its own state."""
    unknown = try_read(sandbox_ledger, lambda ledger: transitions.unknown_task_ids(ledger, tasks))
    return unknown_tasks(sandbox_state_path(sandbox_ledger), tasks if unknown is None else unknown)


def _read_task_ids(job: Job, output: Location) -> Iterator[list[str]]:
    """Yield the task ids of an output, one per row, batch by batch. Raises CommandRefused when it cannot be read."""
    path = _as_named(output)
    if format_of(path) == "csv":
        copies = LocalCopies()
        settings = Input(path=path, separator=job.output.separator, encoding=job.output.encoding)
        yield from filter(None, read_resaved_cells(copies.table_file(InputFile(output, settings)), _task_columns))
        return
    source = InputTable(output, Input(path=path))
    columns = _task_columns(list(source.schema))
    for frame in source.batches() if columns else ():
        for name in columns:
            if tasks := [str(task) for task in as_text(frame.get_column(name)) if task]:
                yield tasks


def _task_columns(names: list[str]) -> list[str]:
    """Return the columns with the tasks of an output. Beside `enrich_task_id`, those of steps came with its input."""
    return [_TASK_ID] if _TASK_ID in names else list(filter(_STEP_TASK_ID.fullmatch, names))


def _as_named(output: Location) -> str:
    """Return the path or URL of an output as a job file names it: a folder ends with a slash."""
    return f"{output}/" if is_dataset(output) and not str(output).endswith("/") else str(output)


def _newest_output(job: Job, changed_after_ms: int | None) -> Location | None:
    """Find the job's newest output, of any date, that is not also its input.

    None: there is no output, or it was not changed after `changed_after_ms`. Objects are not compared with that time.
    """
    pattern = parse_location(job.output_base, job.output.path)
    if isinstance(pattern, ObjectUrl):
        return _newest_object(pattern) if changed_after_ms is None else None
    sandbox_output = parse_location(job.output_base, sandbox_file_name(job.output.path))
    sandbox_outputs = set(_matching_paths(Path(str(sandbox_output))))
    found: list[tuple[float, Path]] = []
    for path in _matching_paths(pattern):
        with suppress(OSError):
            changed_s, is_output = path.stat().st_mtime, path.is_dir() if is_dataset(pattern) else path.is_file()
            if is_output and path not in sandbox_outputs and not is_same_file(job.input_path, path):
                found.append((changed_s, path))
    changed_s, newest = max(found, default=(0.0, None))
    return newest if changed_after_ms is None or 1000 * changed_s > changed_after_ms else None


def _matching_paths(path_pattern: Path) -> list[Path]:
    """Find the files that a name with strftime codes matches."""
    found = [Path(path_pattern.anchor)]
    for part in path_pattern.parts[1:]:
        if "%" not in part:
            found = [path / part for path in found]
            continue
        pattern = _name_pattern(part)
        matches = []
        for path in found:
            with suppress(OSError):
                matches += [path / name for name in os.listdir(path) if pattern.fullmatch(name)]  # noqa: PTH208
        found = matches
    return found


def _name_pattern(name: str) -> re.Pattern[str]:
    pieces = re.split(r"%[-_0^#EO]?(.)", name)
    return re.compile(
        "".join(
            re.escape(piece) if not number % 2 else _STRFTIME_PATTERNS.get(piece, ".+")
            for number, piece in enumerate(pieces)
        ),
        re.DOTALL,
    )


def _newest_object(url_pattern: ObjectUrl) -> ObjectUrl | None:
    """Find the newest object. For a name with codes this is the last by name, because dates sort by name."""
    if "%" not in url_pattern.key and not url_pattern.is_folder:
        return url_pattern if object_store.object_version(url_pattern) is not None else None
    folder, slash, _ = url_pattern.key.partition("%")[0].rpartition("/")
    # Of a folder, the objects in it are listed.
    inside = ".+" if url_pattern.is_folder else ""
    pattern, sandbox_pattern = (
        re.compile(f"({_name_pattern(key).pattern}){inside}", re.DOTALL)
        for key in (url_pattern.key, sandbox_file_name(url_pattern.key))
    )
    keys = [
        found[1]
        for key, _ in object_store.list_objects(replace(url_pattern, key=folder + slash))
        if (found := pattern.fullmatch(key)) and not sandbox_pattern.fullmatch(key)
    ]
    return replace(url_pattern, key=max(keys)) if keys else None


def find_overlap(
    ledger: Database, job: Job, bound_to: Mapping[str, str | None], step_rows: StepRows | None, number: int = 0
) -> Overlap | None:
    """Compare the requests of this pass with the other ledgers in its folder. None: the ledger is not new, or no file.

    With steps: before the first one, the requests of all steps that are known by then; later, those of step `number`.
    """
    if job.sandbox or not isinstance(job.ledger, Path):
        return None
    if step_rows is None or not number:
        if records.has_own_submissions(ledger):
            return None
    elif records.has_sent_step(ledger, step_rows.steps[number].job.step):
        return None
    if step_rows is None:
        batches = neighbour_ledgers.seen_fingerprints(ledger)
    else:
        batches = _fingerprints_of_steps(
            ledger, step_rows, range(number, number + 1 if number else len(step_rows.steps))
        )
    return neighbour_ledgers.compare_with_neighbours(batches, job.ledger, bound_to, COMPARE_TIMEOUT_S)


def _fingerprints_of_steps(ledger: Database, step_rows: StepRows, numbers: Iterable[int]) -> Iterator[list[bytes]]:
    """Yield the distinct requests that steps would send now, many at a time. A limit of the run changes nothing."""
    step_results.begin_plan(ledger)
    for number in numbers:
        for step_batch in replace(step_rows, leads=None).step_batches(number):
            rows = zip(step_batch.to_send().fingerprints, step_batch.known, strict=True)
            new = [name for name, result in rows if name is not None and not (result and result.was_sent)]
            step_results.add_planned(ledger, step_rows.steps[number].job.step, new)
    yield from neighbour_ledgers.planned_fingerprints(ledger)


def refusal_to_pay_again(job: Job, overlap: Overlap, number: int = 0) -> CommandRefused | None:
    """Return why a run needs the user's confirmation; None: it does not. `number` is that of the step."""
    if overlap.paid < max(MIN_REQUESTS, MIN_SHARE * overlap.requests):
        return None
    paid = f"{overlap.paid:,} of the {pluralize(overlap.requests, 'request')}"
    message = (
        f"{paid} are already paid for in {_ledger_names(overlap)}. The new ledger {job.ledger} pays for them again"
    )
    ((main_ledger, _),) = overlap.by_ledger.most_common(1)
    hint = _hint_to_share(job, main_ledger)
    if number:  # the other ledger does not have the answers of the earlier steps
        hint = f"--new-ledger pays again for the step `{job.steps[number].step}`"
    return RunDeclined(message, hint)


def overlap_notes(overlap: Overlap) -> list[str]:
    """Return the notes about a comparison that refuses nothing."""
    notes = []
    if overlap.paid:
        paid = f"{overlap.paid:,} of the {pluralize(overlap.requests, 'request')}"
        notes.append(f"{paid} were already paid for in {_ledger_names(overlap)}, and are paid again in this ledger")
    if overlap.unread:
        names = ", ".join(path.name for path in overlap.unread)
        notes.append(f"{names} could not be read, so it is unknown whether it has paid for the same requests")
    return notes


def _ledger_names(overlap: Overlap) -> str:
    return ", ".join(path.name for path, _ in overlap.by_ledger.most_common())


def confirm_paying_again(context: RunContext, error: CommandRefused) -> None:
    """Ask the user whether to pay again. Raises RunCancelled if not, and the error where no user can answer."""
    confirm = context.options.confirm_new_ledger
    if confirm is None:
        raise error
    with context.signals.interruptible():
        if not confirm(f"{error.message}.\nhint: {error.hint}\nPay again?"):
            raise RunCancelled


async def check_neighbours(context: RunContext, run_state: RunState, step_rows: StepRows | None, number: int) -> None:
    """Compare a new ledger with those beside it, before anything is spent, and again before a later step sends.

    Raises RunDeclined when they have paid for much of the input, unless the user agrees to pay again.
    """
    if context.options.new_ledger or run_state.pays_again:
        return
    bound_to = context.preflight.bound_to
    overlap = await context.ledger_writer.submit(find_overlap, context.job, bound_to, step_rows, number)
    if overlap is None:
        return
    error = refusal_to_pay_again(step_rows.job_input.job if step_rows else context.job, overlap, number)
    if error is not None:
        if run_state.counters.submitted:  # the run does not stop for a confirmation any more
            raise error
        confirm_paying_again(context, error)
        run_state.pays_again = True
    run_state.paid_in_other_ledgers += overlap.paid
    for note in overlap_notes(overlap):
        run_state.add_note(note)


def with_own_output(job: Job) -> tuple[Job, str | None]:
    """Return the job with an output that replaces no real one, and a note when that differs from `--output`.

    Raises CommandRefused when a real run wrote a file under the sandbox run's own name.
    """
    if not job.sandbox:
        return job, None
    note, now = None, datetime.now().astimezone()
    given = job.output_path(now)
    if job.output_is_given and is_written_by_run(job, given):
        own_name = job.output.model_copy(update={"path": sandbox_file_name(job.output.path)})
        job = replace(job, output=own_name)
        note = f"{given} was written by a real run, so the sandbox writes {job.output_path(now)}"
    files: Mapping[str, Location] = {"output": job.output_path(now), **job.extra_output_paths(now)}
    for kind, location in files.items():
        if is_written_by_run(job, location):
            message = f"{location}: the {kind} of the sandbox would replace a file of a real run"
            raise CommandRefused(message, "move that file, or choose another name")
    return job, note


def is_written_by_run(job: Job, location: Location) -> bool:
    """Check whether a real run has written a file: by the ledgers of real runs, or by the tasks in it.

    The tasks do not count in a file with the name of a sandbox output: they are of a sandbox with another ledger.
    """
    if not is_sandbox_file_name(_as_named(location)):
        with suppress(CommandRefused, OSError):  # it has no readable tasks
            if any(_without_sandbox_tasks(job.ledger, tasks) for tasks in _read_task_ids(job, location)):
                return True
    return any(try_read(ledger, lambda db: records.has_written(db, str(location))) for ledger in _real_ledgers(job))


def _real_ledgers(job: Job) -> list[LedgerLocation]:
    """Return the ledgers of real runs near the job: beside its ledger and at the default place."""
    own_folder = job.ledger.parent if isinstance(job.ledger, Path) else job.ledger.local_folder
    found: list[LedgerLocation] = []
    for folder in dict.fromkeys((own_folder, job.resolve_path(".enrich"))):
        found += find_ledger_files(folder)
    if isinstance(job.ledger, PostgresLocation):
        found.append(real_ledger_location(job.ledger))
    return found
