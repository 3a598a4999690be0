"""Hostile files: refused in little more memory than a small file takes, and copies that outlive no kill."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from enrich.files import input_files
from tests.files.test_ugly_files import write_sheet

#: A hostile file may take this many times the memory of a small file of its format.
MAX_RATIO = 2.0
MEASURE = """
import resource, sys
from pathlib import Path
from enrich.errors import CommandRefused
from enrich.files.reader import InputTable
from enrich.job.spec import Input
try:
    for frame in InputTable(Path(sys.argv[1]), Input(path=sys.argv[1])).batches():
        pass
except CommandRefused:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(path: Path) -> int:
    """Return the peak memory (KiB) of a process that reads a file, or is refused to."""
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    return int(result.stdout)


def write_hostile(folder: Path, kind: str) -> Path:
    """Write a hostile file, and return it."""
    if kind == "stray cell":
        return write_sheet(folder / "bad.xlsx", '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>')
    if kind == "shared strings":
        path = write_sheet(folder / "bad.xlsx", "")
        with (
            zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("xl/sharedStrings.xml", "w", force_zip64=True) as member,
        ):
            for _ in range(1025):
                member.write(bytes(1 << 20))
        return path
    path = folder / "bad.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'a,b\n"' if kind == "open quote" else b"a,b\n")
        chunk = {"long line": b"1" * (1 << 20), "open quote": b"x\n" * (1 << 19), "long rows": b"x" * 200_000 + b",1\n"}
        for _ in range(400):
            file.write(chunk[kind])
    return path


@pytest.mark.long
@pytest.mark.parametrize("kind", ["stray cell", "long line", "open quote", "long rows", "shared strings"])
def test_memory_of_hostile_files(tmp_path: Path, kind: str) -> None:
    """Peak memory is at most twice that of a small file of the same format."""
    hostile = write_hostile(tmp_path, kind)
    if hostile.suffix == ".xlsx":
        small = write_sheet(tmp_path / "small.xlsx", '<row r="2"><c r="A2"><v>1</v></c></row>')
    else:
        small = tmp_path / "small.csv.gz"
        small.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert peak_memory(hostile) <= MAX_RATIO * peak_memory(small)


def test_folders_of_killed_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a killed process is removed by the next; one that is in use, young or another's is not."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "from enrich.files.input_files import temporary_folder\n"
        "with temporary_folder() as folder: print(folder, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "stdin").write_text("a lead")
    long_ago = time.time() - 3600
    other = tmp_path / "enrich-other"
    other.mkdir()
    for path in (folder, other):
        os.utime(path, (long_ago, long_ago))

    input_files.remove_abandoned_folders()
    assert folder.exists()
    process.kill()
    process.communicate()
    input_files.remove_abandoned_folders(min_age_s=7200)
    assert folder.exists()
    input_files.remove_abandoned_folders()
    assert [path.name for path in tmp_path.iterdir()] == ["enrich-other"]
