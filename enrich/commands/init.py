"""`enrich init`: writes a commented job file for a CSV and a waterfall or an enrichment."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shlex
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import polars as pl

from enrich.commands import options
from enrich.commands.init_columns import count_matched_params, describe_column, is_usual_header
from enrich.commands.init_template import JobDraft, Sample, render_job_file
from enrich.commands.streams import echo_message
from enrich.commands.waterfalls import list_descriptions, read_description
from enrich.databar.description import DOCUMENTED_ON, DOCUMENTED_WATERFALLS, Description
from enrich.errors import ApiKeyRejected, ApiUnreachable, CommandRefused, JobError, suggest_name
from enrich.files.atomic import replace_file
from enrich.files.csv_format import SEPARATORS, read_batches, read_header
from enrich.files.reader import InputTable
from enrich.files.text import NO_HEADER, NO_HEADER_HINT, FileProblem, TableFile, byte_order_encoding, looks_like_cell
from enrich.files.values import text_frame
from enrich.job.field_types import is_text_encoding
from enrich.job.local_files import read_text
from enrich.job.locations import as_argument, format_of
from enrich.job.spec import Input, json_schema
from enrich.job.target import Target, TargetKind

SAMPLE_ROWS = 1_000
#: With this many usual names a first line is a header.
_USUAL_HEADERS = 2
_CHUNK_BYTES = 1 << 20
#: The bytes that cp1252 lacks. Texts of other languages than those of Western Europe have some of them.
_NOT_CP1252 = frozenset(b"\x81\x8d\x8f\x90\x9d")


def take_sample(path: Path, encoding: str | None = None, sheet: str | None = None) -> Sample:
    """Detect separator and encoding (None), and read the first rows. Raises CommandRefused if that fails."""
    if (kind := format_of(path.name)) not in ("csv", None):
        source = InputTable(path, Input(path=str(path), sheet=sheet))
        frame = next(source.batches(), None)
        return _make_sample(TableFile(path, format=kind, sheet=sheet), list(source.schema), frame)
    encoding = encoding or _detect_encoding(path)
    attempts = [_try_format(TableFile(path, separator, encoding)) for separator in SEPARATORS]
    # With the right separator the rows have as many cells as the header, and more than with any other separator.
    readable = [sample for sample in attempts if isinstance(sample, Sample)]
    best = max(readable, key=lambda sample: len(sample.columns), default=None)
    if best is None or (len(best.columns) == 1 and len(readable) < len(SEPARATORS)):
        raise next(problem for problem in attempts if isinstance(problem, FileProblem))
    return best


def _try_format(source: TableFile) -> Sample | FileProblem:
    try:
        header = read_header(source)
        frame = next(read_batches(source, SAMPLE_ROWS), None)
    except FileProblem as problem:
        return problem
    return _make_sample(source, header, frame)


def _make_sample(source: TableFile, header: list[str], frame: pl.DataFrame | None) -> Sample:
    # Exports have names such as `ACCOUNT.NAME`, which may also be a domain.
    if any(map(looks_like_cell, header)) and sum(map(is_usual_header, header)) < _USUAL_HEADERS:
        raise CommandRefused(f"{source}: the first line {NO_HEADER}", NO_HEADER_HINT)
    rows = None if frame is None else text_frame(frame.head(SAMPLE_ROWS))
    columns = [describe_column(name, [] if rows is None else rows.get_column(name).to_list()) for name in header]
    return Sample(source, columns, 0 if rows is None else rows.height)


def _detect_encoding(path: Path) -> str:
    """Return the encoding of the byte order mark if there is one, UTF-8 if the whole file is valid, else cp1252.

    A UTF-8 mark counts only if the file is valid. Raises CommandRefused if the file is none of them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        if not path.is_file():
            return "utf-8"
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as raw:
            beginning = raw.read(4)
            marked = byte_order_encoding(beginning)
            if marked not in (None, "utf-8"):
                return marked
            decoder.decode(beginning)
            while chunk := raw.read(_CHUNK_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        if not _NOT_CP1252.isdisjoint(error.object):
            hint = "name the encoding that it was saved in, such as `--encoding cp932`"
            raise CommandRefused(f"{path} is not UTF-8 or cp1252 text", hint) from None
        return "cp1252"
    except (OSError, EOFError, zlib.error):
        return "utf-8"  # reading the table reports the error
    return "utf-8-sig" if marked else "utf-8"


def draft_job(sample: Sample, description: Description, source: str, target: Path | None) -> str:
    """Return the text of a job file to be saved at `target` (None: in the working directory)."""
    job_folder = target.resolve().parent if target else Path.cwd()
    leads = sample.format.path
    stem = leads.name.removesuffix(".gz").rsplit(".", 1)[0]
    relative = os.path.relpath(leads.absolute(), job_folder)
    return render_job_file(
        JobDraft(
            sample,
            description,
            source,
            # More than one folder up, the absolute path is clearer.
            input=relative if relative.count("..") <= 1 else str(leads.absolute()),
            output=f"{stem}_enriched.csv".replace("%", "%%"),
            schema="schema.json" if _is_our_schema(job_folder / "schema.json") else None,
        )
    )


def _is_our_schema(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == json_schema())
    except (OSError, ValueError):
        return False


def write_new_file(text: str, target: Path, *, force: bool, other: str = "another name with -o") -> None:
    """Write a file (mode 0600). Raises JobError if it exists (without `force`), CommandRefused if that fails."""
    if not force and os.path.lexists(target):
        raise JobError(f"{target} already exists", f"choose {other}, or replace it with --force")
    try:
        replace_file(target, text.encode())
    except OSError as error:
        hint = f"choose {other}, or change the permissions of its folder"
        raise CommandRefused(f"{target}: cannot be written: {error.strerror}", hint) from error


def _is_job_file(path: Path) -> bool:
    """Return whether a file is text with a job's first keys, also one whose YAML is broken."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError):
        return False
    keys = {line.partition(":")[0] for line in text.splitlines()}
    return {"version", "input"} <= keys


def rank_waterfalls(available: Sequence[Description], sample: Sample) -> Iterator[str]:
    """Yield a line about how well each waterfall fits the columns, best first."""
    rated = [(count_matched_params(waterfall, sample.columns), waterfall) for waterfall in available]
    rated.sort(key=lambda each: (each[0][1] - each[0][0], -each[0][1], each[1].identifier))
    width = max((len(waterfall.identifier) for waterfall in available), default=0)
    for (found, needed), waterfall in rated:
        required_names = ", ".join(param.name for param in waterfall.input_params if param.required) or "params unknown"
        yield f"  {waterfall.identifier:<{width}}  {found} of {needed} required params matched: {required_names}"


def _read_available(*, use_sandbox: bool, offline: bool) -> tuple[Sequence[Description], str]:
    """Return the waterfalls, from the API or else from the documentation, and a text that names the source."""
    documented = (
        list(DOCUMENTED_WATERFALLS.values()),
        f"the public documentation of {DOCUMENTED_ON}, which may be out of date",
    )
    if offline:
        return documented
    try:
        with options.open_access(None, use_sandbox=use_sandbox) as access:
            listed = list_descriptions(access, TargetKind.WATERFALL)
            return listed, _source_text(access.host, use_sandbox=use_sandbox)
    except (ApiKeyRejected, ApiUnreachable) as error:
        echo_message(f"{error.message}; using the waterfalls of the documentation", label="note: ")
    return documented


def _choose_waterfall(
    leads: Path, sample: Sample, identifier: str | None, given: Sequence[str], *, use_sandbox: bool, offline: bool
) -> tuple[Description, str]:
    """Return a waterfall and a text that names the source. Without an identifier, list those that fit: JobError.

    `given` are the options of this command, for the one that follows.
    """
    available, source = _read_available(use_sandbox=use_sandbox, offline=offline)
    if identifier is not None:
        known = {each.identifier: each for each in available}
        if identifier not in known:
            hint = suggest_name(identifier, list(known))
            raise JobError(f"--waterfall: no waterfall `{identifier}` in {source}", hint)
        return known[identifier], source
    echo_message(f"Waterfalls from {source}, best fit for {leads} first:")
    echo_message("\n".join(rank_waterfalls(available, sample)))
    command = ["enrich", "init", as_argument(leads), *given, "--waterfall", "ID"]
    raise JobError("no waterfall is chosen", shlex.join(command))


def _source_text(host: str, *, use_sandbox: bool) -> str:
    return f"{'the built-in sandbox' if use_sandbox else f'the API at {host}'} on {datetime.now(UTC):%Y-%m-%d}"


@click.command()
@click.argument("leads", metavar="CSV", type=options.FILE)
@click.option(
    "--waterfall",
    "identifier",
    metavar="ID",
    help="The waterfall. Without it, list the waterfalls that fit the columns.",
)
@click.option(
    "--enrichment", "number", type=options.Number(1), metavar="ID", help="An enrichment instead of a waterfall."
)
@click.option(
    "-o",
    "--out",
    type=options.FILE_OR_STDOUT,
    metavar="JOB.yaml",
    help="The job file to write, or - for stdout. Default: named after the CSV, in this folder.",
)
@click.option(
    "--encoding", metavar="NAME", help="The encoding of the CSV, such as cp932. Default: UTF-8, UTF-16 or cp1252."
)
@click.option("--sheet", metavar="NAME", help="The sheet of a workbook. Default: the first visible one with cells.")
@click.option("--sandbox", "use_sandbox", is_flag=True, help="Use the waterfalls of the built-in sandbox.")
@click.option("--offline", is_flag=True, help="Use the built-in descriptions of waterfalls, without network.")
@click.option("--force", is_flag=True, help="Replace an existing job file.")
def init(
    leads: Path,
    identifier: str | None,
    number: int | None,
    out: Path | None,
    encoding: str | None,
    sheet: str | None,
    use_sandbox: bool,
    offline: bool,
    force: bool,
) -> None:
    """Write a commented job file for CSV: its columns matched to the params of a waterfall or an enrichment.

    Comments explain each match. Next: enrich check JOB.
    """
    if use_sandbox and offline:
        raise click.UsageError("--sandbox and --offline: choose one")
    if number is not None and identifier is not None:
        raise click.UsageError("--waterfall and --enrichment: choose one")
    if number is not None and offline:
        raise click.UsageError("--enrichment needs the API, because enrichments have no built-in description")
    if encoding is not None and not is_text_encoding(encoding):
        raise click.UsageError(f"--encoding: unknown encoding `{encoding}`: use a name such as utf-8, cp1252 or cp932")
    if sheet is not None and format_of(leads.name) != "xlsx":
        raise click.UsageError("--sheet is for workbooks (.xlsx)")
    sample = take_sample(leads, encoding, sheet)
    if number is not None:  # no documentation describes enrichments
        with options.open_access(None, use_sandbox=use_sandbox) as access:
            description = read_description(access, Target(TargetKind.ENRICHMENT, str(number)))
            source = _source_text(access.host, use_sandbox=use_sandbox)
    else:
        texts = {"--encoding": encoding, "--sheet": sheet}
        given = [word for option, text in texts.items() if text is not None for word in (option, text)]
        given += [option for option, is_set in {"--sandbox": use_sandbox, "--offline": offline}.items() if is_set]
        description, source = _choose_waterfall(
            leads, sample, identifier, given, use_sandbox=use_sandbox, offline=offline
        )
    printed = out == Path("-")
    target = out or Path(leads.name.removesuffix(".gz")).with_suffix(".yaml")
    text = draft_job(sample, description, source, None if printed else target)
    if printed:
        click.echo(text, nl=False)
        return
    if force and target.exists() and not _is_job_file(target):
        raise JobError(f"{target} is not a job file, so --force does not replace it", "choose another name with -o")
    write_new_file(text, target, force=force)
    echo_message(f"Written: {target}. Read it, then: {shlex.join(['enrich', 'check', as_argument(target)])}")
