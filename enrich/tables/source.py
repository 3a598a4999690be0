"""The input as one table: whatever its format, one file or several, here, in a storage or through a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import file_digest, sha256
from pathlib import Path

import polars as pl

from enrich.errors import CommandRefused
from enrich.job.locations import STDIN, Location, ObjectUrl
from enrich.job.spec import Input
from enrich.tables.copies import LocalCopies
from enrich.tables.finding import InputFile, find_input_files, find_objects, find_paths
from enrich.tables.parts import InputPart, divide_files
from enrich.tables.reading import common_schema, count_file_rows, read_batches, read_metadata
from enrich.tables.textfile import FileProblem, as_refused

#: Counts the rows of files.
RowCounter = Callable[[Sequence[InputFile]], Sequence[int]]


class InputTable:
    """A table that can be read again and again; what is not a file of its own is copied to a private one."""

    def __init__(self, location: Location, settings: Input) -> None:
        """Find the files and read their headers. Raises Refused that names the very file and the remedy."""
        self._location = location
        self._copies = LocalCopies()
        with as_refused():
            self.input_files = self._find_files(settings)
            metadata = read_metadata(self.input_files, self._copies)
            self.input_schema = common_schema(self.input_files, metadata)
        # Of the files that say it themselves.
        self._known_row_counts = {
            file: info.rows for file, info in zip(self.input_files, metadata, strict=True) if info.rows is not None
        }
        self.schema = self.input_schema.all_columns
        self.first_position = 0

    def file_versions(self) -> object:
        """Return what is another when files were replaced, changed, added or are gone."""
        location = self._location
        if isinstance(location, ObjectUrl):
            try:
                return find_objects(location)
            except (CommandRefused, FileProblem):  # what was found stands as long as nothing newer is known
                return {file.location: file.version for file in self.input_files}
        if location == STDIN:
            return True
        if self.input_files[0].location == location:
            return _file_identity(location)
        try:
            return [(path, _file_identity(path)) for path in find_paths(location)]
        except FileProblem:
            return None

    def digest(self) -> str:
        """Hash the bytes of all files (SHA-256, hex), and what their folders say."""
        total = sha256()
        with as_refused():
            for file in self.input_files:
                try:
                    with self._copies.table_file(file).path.open("rb") as raw:
                        total.update(file_digest(raw, "sha256").digest())
                except OSError as error:
                    raise FileProblem(f"{file} cannot be read: {error.strerror}") from None
                total.update(repr(file.partition_values).encode() if file.partition_values else b"")
        return total.hexdigest()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows of all files in order, each column in its type. Raises Refused."""
        with as_refused():
            for file in self.input_files:
                yield from read_batches(file, self.input_schema, self._copies)

    def parts(self, row_counter: RowCounter | None = None) -> list[InputPart]:
        """Divide the rows; `counting` counts those of files that do not say it themselves. Raises Refused."""
        unknown = [leaf for leaf in self.input_files if leaf not in self._known_row_counts]
        with as_refused():
            rows = (row_counter or self._count_rows)(unknown)
        row_counts = self._known_row_counts | dict(zip(unknown, rows, strict=True))
        return divide_files((leaf, row_counts[leaf]) for leaf in self.input_files)

    def _count_rows(self, input_files: Sequence[InputFile]) -> list[int]:
        return [count_file_rows(file, self.input_schema, self._copies) for file in input_files]

    def _find_files(self, settings: Input) -> list[InputFile]:
        if self._location == STDIN:
            return [InputFile(self._copies.copy_stdin(), settings, "standard input")]
        return find_input_files(self._location, settings)


def _file_identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
