"""Finds the files of an input: one, all that match a pattern, or all of a folder, here or in a storage."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from enrich.place import Place, Url, has_signs, is_pattern
from enrich.spec import Input
from enrich.tables import storage
from enrich.tables.manifest import MANIFEST, Manifest, read_manifest
from enrich.tables.textfile import CALLED, TableFile, TableProblem

#: A folder's name that says a column's value for all that is in it, as Hive, Spark and Polars write it.
_SAYS = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_ITSELF = re.compile(r"\[[*?\[]\]")
_NOTHING = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One file of the input: where it lies, how it is to be understood, and what the names of its folders say.

    `stamp` is what an object was when it was found; it has to be the same when it is read.
    """

    where: Place
    told: Input
    called: str | None = None
    says: tuple[tuple[str, str | None], ...] = ()
    stamp: storage.Stamp | None = None

    def file(self, path: Path) -> TableFile:
        """The file to read, which for an object is a copy."""
        told, called = self.told, self.called or str(self.where)
        return TableFile(path, told.separator, told.encoding, told.format, told.sheet, called)

    def __str__(self) -> str:
        return self.called or str(self.where)


def find(where: Place, told: Input) -> list[Leaf]:
    """Find the files of an input. Raises TableProblem that names the file and the remedy."""
    if isinstance(where, Url):
        found = [Leaf(url, told, stamp=stamp) for url, stamp in objects(where).items()]
    else:
        if where.exists() and not (where.is_file() or where.is_dir()):
            raise TableProblem(f"{where} is a pipe or a device, not a file", "pipe the leads in: --input -")
        found = [Leaf(path, told) for path in files(where)]
    if [leaf.where for leaf in found] == [where]:
        return found
    if not found and is_pattern(where):
        raise TableProblem(f"{where}: no file matches", "check the pattern, which is relative to the job file")
    if not found:
        raise TableProblem(f"{where} has no files in it", "hidden files and those that begin with `_` do not count")
    return _of_one_kind([replace(leaf, says=_says(where, leaf.where), told=_told(told, leaf)) for leaf in found])


def files(where: Path) -> list[Path]:
    """Return the files that a place on this machine means, sorted by their paths; hidden ones do not count.

    Raises TableProblem for a folder that may not be read.
    """
    if is_pattern(where):
        return sorted(path for path in map(Path, glob.glob(str(where))) if path.is_file())  # noqa: PTH207 - Path.glob finds hidden files
    return sorted(_below(where)) if where.is_dir() else [where]


def would_find(where: Place, target: Place) -> bool:
    """Tell whether a folder or a pattern means a file that may not be there yet."""
    if isinstance(where, Url):
        several = where.is_folder or is_pattern(where)
        same = isinstance(target, Url) and (target.scheme, target.bucket) == (where.scheme, where.bucket)
        return several and same and isinstance(target, Url) and _is_meant(where, target.key, where.key)
    if isinstance(target, Url):
        return False
    if is_pattern(where):
        return target.match(str(where))
    below = target.resolve()
    return (
        where.is_dir()
        and below.is_relative_to(where.resolve())
        and all(map(_counts, below.relative_to(where.resolve()).parts))
    )


def _below(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        hint = "give yourself the right to read it"
        raise TableProblem(f"{error.filename} cannot be read: {error.strerror}", hint) from None

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if _counts(name)]
        yield from (path for name in names if _counts(name) and (path := Path(parent, name)).is_file())


def objects(where: Url) -> dict[Url, storage.Stamp | None]:
    """Return the objects that a URL means, sorted by their keys, with their stamps; None: there is none of this name.

    Raises Refused, and TableProblem for a dataset of ours that is not whole.
    """
    if not where.is_folder:
        stamp = storage.stamp(where)
        if stamp is not None or not is_pattern(where):
            return {where: stamp}
    parts = where.key.split("/")
    folder = "".join(f"{part}/" for part in parts[: _fixed(parts)]) if is_pattern(where) else where.key
    there = dict(storage.below(replace(where, key=folder)))
    found = {key: stamp for key, stamp in there.items() if _is_meant(where, key, folder)}
    if where.is_folder and folder + MANIFEST in there:
        # Other parts are of a writer that is at work, or was killed.
        manifest = read_manifest(storage.read(replace(where, key=folder + MANIFEST)))
        found = found if manifest is None else _named_by(manifest, where, found)
    return {replace(where, key=key): found[key] for key in sorted(found, key=lambda key: key.split("/"))}


def _named_by(manifest: Manifest, where: Url, found: dict[str, storage.Stamp]) -> dict[str, storage.Stamp]:
    named = {where.key + name for name in manifest.names}
    if missing := named - found.keys():
        raise TableProblem(f"{where} lacks a part of its own: {min(missing)}", "write the dataset again")
    return {key: found[key] for key in named}


def _is_meant(where: Url, key: str, folder: str) -> bool:
    if where.is_folder:
        return key.startswith(folder) and not key.endswith("/") and all(map(_counts, key[len(folder) :].split("/")))
    parts, wanted = key.split("/"), where.key.split("/")
    return len(parts) == len(wanted) and all(
        fnmatchcase(part, sign) and (sign.startswith(".") or not part.startswith("."))
        for part, sign in zip(parts, wanted, strict=True)
    )


def _counts(name: str) -> bool:
    return not name.startswith((".", "_"))


def _told(told: Input, leaf: Leaf) -> Input:
    """Let each file say for itself what an ending says: the input may be `leads/`."""
    said = told.model_dump(exclude_unset=True)
    return Input.model_validate(said | {"path": leaf.where.name})


def _says(where: Place, leaf: Place) -> tuple[tuple[str, str | None], ...]:
    """Read what the folders say that lie between the place that was named and the file."""
    whole, named = _parts(leaf), _parts(where)
    matches = (_SAYS.fullmatch(part) for part in whole[_fixed(named) : -1])
    pairs = ((unquote(match[1]), unquote(match[2])) for match in matches if match)
    return tuple((name, None if value == _NOTHING else value) for name, value in pairs)


def _parts(place: Place) -> Sequence[str]:
    return place.parts if isinstance(place, Path) else place.key.rstrip("/").split("/")


def _fixed(parts: Sequence[str]) -> int:
    """Count the parts before the first that is a pattern; `[*]` stands for the sign itself."""
    return next((place for place, part in enumerate(parts) if has_signs(_ITSELF.sub("", part))), len(parts))


def _of_one_kind(leaves: list[Leaf]) -> list[Leaf]:
    first = leaves[0]
    for leaf in leaves:
        if leaf.told.format != first.told.format:
            hint = "keep files of one format together, or set `format`"
            raise TableProblem(f"{leaf} is {CALLED[leaf.told.format]}, but {first} is not", hint)
        names = [name for name, _ in leaf.says]
        if len(set(names)) < len(names):
            raise TableProblem(f"{leaf}: its folders name a column twice: {_named(names)}", "rename one of them")
        if names != [name for name, _ in first.says]:
            message = f"{leaf}: its folders name {_named(names)}, those of {first} {_named([n for n, _ in first.says])}"
            raise TableProblem(message, "let the folders of all files name the same columns, in one order")
    return leaves


def _named(names: list[str]) -> str:
    return " / ".join(f"`{name}=`" for name in names) or "no column"
