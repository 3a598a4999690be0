"""The input as one table: whatever its format, one file or several, here, in a storage or through a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import file_digest, sha256
from pathlib import Path

import polars as pl

from enrich.errors import Refused
from enrich.place import STDIN, Place, Url
from enrich.spec import Input
from enrich.tables.copies import Copies
from enrich.tables.finding import Leaf, files, find, objects
from enrich.tables.parts import Part, divide
from enrich.tables.reading import batches, common_shape, count, outlines
from enrich.tables.textfile import TableProblem, refusing

#: Counts the rows of files.
Counting = Callable[[Sequence[Leaf]], Sequence[int]]


class Source:
    """A table that can be read again and again; what is not a file of its own is copied to a private one."""

    def __init__(self, where: Place, told: Input) -> None:
        """Find the files and read their headers. Raises Refused that names the very file and the remedy."""
        self._where = where
        self._copies = Copies()
        with refusing():
            self.leaves = self._find(told)
            found = outlines(self.leaves, self._copies)
            self.shape = common_shape(self.leaves, found)
        # Of the files that say it themselves.
        self._counted = {
            leaf: outline.rows for leaf, outline in zip(self.leaves, found, strict=True) if outline.rows is not None
        }
        self.schema = self.shape.schema
        self.first = 0

    def stamp(self) -> object:
        """Return what is another when files were replaced, changed, added or are gone."""
        where = self._where
        if isinstance(where, Url):
            try:
                return objects(where)
            except (Refused, TableProblem):  # what was found stands as long as nothing newer is known
                return {leaf.where: leaf.stamp for leaf in self.leaves}
        if where == STDIN:
            return True
        if self.leaves[0].where == where:
            return _identity(where)
        try:
            return [(path, _identity(path)) for path in files(where)]
        except TableProblem:
            return None

    def digest(self) -> str:
        """Hash the bytes of all files (SHA-256, hex), and what their folders say."""
        total = sha256()
        with refusing():
            for leaf in self.leaves:
                try:
                    with self._copies.file(leaf).path.open("rb") as raw:
                        total.update(file_digest(raw, "sha256").digest())
                except OSError as error:
                    raise TableProblem(f"{leaf} cannot be read: {error.strerror}") from None
                total.update(repr(leaf.says).encode() if leaf.says else b"")
        return total.hexdigest()

    def batches(self) -> Iterator[pl.DataFrame]:
        """Yield the rows of all files in order, each column in its type. Raises Refused."""
        with refusing():
            for leaf in self.leaves:
                yield from batches(leaf, self.shape, self._copies)

    def parts(self, counting: Counting | None = None) -> list[Part]:
        """Divide the rows; `counting` counts those of files that do not say it themselves. Raises Refused."""
        unknown = [leaf for leaf in self.leaves if leaf not in self._counted]
        with refusing():
            rows = (counting or self._count)(unknown)
        counted = self._counted | dict(zip(unknown, rows, strict=True))
        return divide((leaf, counted[leaf]) for leaf in self.leaves)

    def _count(self, leaves: Sequence[Leaf]) -> list[int]:
        return [count(leaf, self.shape, self._copies) for leaf in leaves]

    def _find(self, told: Input) -> list[Leaf]:
        if self._where == STDIN:
            return [Leaf(self._copies.received(), told, "standard input")]
        return find(self._where, told)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
