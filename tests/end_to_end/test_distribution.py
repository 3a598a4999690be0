"""The distribution: builds are reproducible, the wheel runs on its own, and what it cannot work with is reported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from databar_enrich import find_conflict
from tests.support.documents import ALL_DOCUMENTS, ROOT
from tests.support.workspace import Workspace, make_leads, serve_api

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: What a build reads.
SOURCES = ("databar_enrich.py", "enrich", "jobs", "sample_data", "pyproject.toml", "README.md", "LICENSE", ".gitignore")


def copy_sources(folder: Path, *, mode: int) -> Path:
    """Copy the sources. Their times are those of the copy, and their rights are `mode`."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(".enrich")
            )
        else:
            shutil.copyfile(ROOT / name, folder / name)
    for path in folder.rglob("*"):
        path.chmod(mode | 0o700 * path.is_dir())
    return folder


def build(folder: Path) -> dict[str, bytes]:
    """Build wheel and source archive, and return them by their names."""
    environ = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build"], cwd=folder, check=True, capture_output=True, env=environ
    )
    return {path.name: path.read_bytes() for path in sorted((folder / "dist").iterdir())}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("build") / "source"
    build(copy_sources(folder, mode=0o644))
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture
def bare_venv(tmp_path: Path) -> Path:
    """Make an environment that has the dependencies, but not this checkout."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages(folder) / "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    return folder


def site_packages(folder: Path) -> Path:
    """Return where an environment has its packages."""
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel, and return its program."""
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", "--quiet", wheel], check=True)
    return folder / "bin" / "enrich"


def run_program(program: Path, folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run an installed program in a folder with an environment that has nothing of this checkout."""
    environ = {"PATH": os.defpath, "HOME": str(folder), **environ}
    return subprocess.run(
        [program, *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=100
    )


@pytest.mark.long
def test_builds_are_reproducible(tmp_path: Path, wheel: Path) -> None:
    """Other times, rights and folders give the same bytes, and so does the source archive."""
    built = build(copy_sources(tmp_path / "other", mode=0o600))
    assert built[wheel.name] == wheel.read_bytes()
    archive = next(name for name in built if name.endswith(".tar.gz"))
    assert built[archive] == (wheel.parent / archive).read_bytes()
    with tarfile.open(wheel.parent / archive) as source:
        source.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        source.extractall(tmp_path / "unpacked")  # noqa: S202 - our own archive
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert build(unpacked)[wheel.name] == wheel.read_bytes()


@pytest.mark.long
def test_the_wheel_has_the_program_and_nothing_else(wheel: Path) -> None:
    """No tests, no examples, no leads; the data files of the package are there."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"enrich", "databar_enrich.py"}
    in_tree = {str(path.relative_to(ROOT)) for path in (ROOT / "enrich").rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("enrich/")} == {
        name for name in in_tree if "__pycache__" not in name
    }


@pytest.mark.long
def test_the_installed_wheel_runs_the_demo_and_a_job(wheel: Path, bare_venv: Path, workspace: Workspace) -> None:
    """From an environment of its own: the sample job with the sandbox, and a job with a served one."""
    program = install(wheel, bare_venv)
    for name in ("jobs", "sample_data"):
        shutil.copytree(ROOT / name, workspace.folder / name, ignore=shutil.ignore_patterns(".enrich"))
    demo = run_program(program, workspace.folder, "run", "jobs/leads.yaml", "--sandbox", "--limit", "5", "--json")
    assert (demo.returncode, '"submitted": 5' in demo.stdout) == (0, True)
    workspace.write_leads(make_leads(3))
    with serve_api(workspace.folder / "api.db") as api:
        done = run_program(program, workspace.folder, "run", "job.yaml", **api.environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert api.audit()["accepted"] == 3
    assert len(workspace.read_output()) == 3


@pytest.mark.long
def test_another_distribution_of_the_package_is_reported(wheel: Path, bare_venv: Path, tmp_path: Path) -> None:
    """After another package `enrich` was installed beside it, or removed with files of ours, one line says so."""
    program = install(wheel, bare_venv)
    add_distribution(site_packages(bare_venv), "enrich-2.1", "enrich/__init__.py,,\nenrich/core.py,,\n")
    result = run_program(program, tmp_path, "status", "job.yaml", "--json")
    assert (result.returncode, result.stderr.count("\n"), '"exit_code": 2' in result.stdout) == (2, 1, True)
    assert "enrich-2.1 has files in the package `enrich`, too" in result.stderr
    (site_packages(bare_venv) / "enrich" / "__init__.py").unlink()
    shutil.rmtree(site_packages(bare_venv) / "enrich-2.1.dist-info")
    result = run_program(program, tmp_path, "--version")
    assert (result.returncode, "environment of its own" in result.stderr) == (2, True)


def add_distribution(folder: Path, name: str, record: str) -> None:
    """Add the record of an installed distribution."""
    (folder / f"{name}.dist-info").mkdir()
    (folder / f"{name}.dist-info" / "RECORD").write_text(record, encoding="utf-8")


def test_conflicts_are_found_in_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files in the package count, not names that begin alike."""
    (tmp_path / "enrich").mkdir()
    (tmp_path / "enrich" / "__init__.py").touch()
    monkeypatch.setattr(
        "databar_enrich.find_spec", lambda _: type("Spec", (), {"origin": f"{tmp_path}/enrich/__init__.py"})
    )
    add_distribution(tmp_path, "databar_enrich-0.1.0", "databar_enrich.py,,\nenrich/__init__.py,,\n")
    add_distribution(tmp_path, "data_enrich-1", "data_enrich/enrich/x.py,,\nenricher/y.py,,\nenrich.py,,\n")
    assert find_conflict(tmp_path) is None
    add_distribution(tmp_path, "leads-3", "enrich/leads.py,,\n")
    (tmp_path / "old.egg-info").mkdir()
    (tmp_path / "old.egg-info" / "top_level.txt").write_text("other\nenrich\n", encoding="utf-8")
    conflict = find_conflict(tmp_path)
    assert conflict is not None
    assert conflict.startswith("leads-3, old has files")


def test_another_package_that_python_finds_first_is_reported(tmp_path: Path) -> None:
    """A package `enrich` elsewhere is named with its path."""
    conflict = find_conflict(tmp_path)
    assert conflict is not None
    assert str(ROOT / "enrich" / "__init__.py") in conflict


def test_windows_is_told_to_use_wsl() -> None:
    """On Windows the program says one line before it imports anything, and exits with 2; so does the Python API."""
    for arguments in ([], ["run", "job.yaml", "--json"]):
        code = (
            f"import sys; sys.platform = 'win32'; sys.argv[1:] = {arguments}; from databar_enrich import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n"), "WSL" in done.stderr) == (2, 1, True)
        assert ("WSL" in done.stdout) is bool(arguments)
    code = "import sys; sys.platform = 'win32'; import enrich; enrich.run_job"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: Windows is not supported")


def test_constraints_are_names_and_versions() -> None:
    """`constraints.txt` has a version for each dependency, one that is allowed, and neither addresses nor hashes."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    versions = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    needed = [Requirement(line) for line in [*PROJECT["dependencies"], *extras, "hatchling"]]
    for requirement in needed:
        if requirement.name != PROJECT["name"] and requirement.name != "databar":  # the SDK is for `make bench` only
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_no_document_says_that_it_is_published() -> None:
    """Every documented install names a file or a folder, as no index has the program."""
    for document in ALL_DOCUMENTS:
        assert not re.findall(r"install [^`\n]*'databar-enrich\[", document.read_text(encoding="utf-8")), document


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_completed(shell: str) -> None:
    """The command prints the completion script that the documentation names."""
    shown = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f"_ENRICH_COMPLETE={shell}_source enrich" in shown
    environ = os.environ | {"_ENRICH_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [sys.executable, "-m", "enrich"], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert "_ENRICH_COMPLETE" in done.stdout
