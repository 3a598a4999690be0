"""Lints the Containerfile, and runs its steps in a clean root folder where no container engine can run.

`python -m tests.support.container` does both with the packages of the index, as an engine would. It needs root on
Linux: the root folders have the system's programs and this Python, read-only, and the mounts end with the process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.documents import ROOT

CONTAINERFILE = ROOT / "Containerfile"
#: What a slim base image has, too.
SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib64", "usr")
#: What the image must not need from the machine that it is built on.
LEFT_OUT = shutil.ignore_patterns("site-packages", "test", "idlelib", "__pycache__", "share")


@dataclass(frozen=True)
class Instruction:
    """An instruction, such as `RUN`, and its text."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the text; for the JSON form, its elements."""
        words: list[str] = json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)
        return words


@dataclass
class Stage:
    """A stage: its base image, its name if it has one, and its instructions."""

    base: str
    name: str | None
    instructions: list[Instruction] = field(default_factory=list)

    def values(self, name: str) -> list[list[str]]:
        """Return the words of each instruction of this name."""
        return [each.words for each in self.instructions if each.name == name]


def parse_stages(text: str) -> list[Stage]:
    """Parse a Containerfile."""
    stages: list[Stage] = []
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    for line in filter(None, map(str.strip, lines)):
        name, _, rest = line.partition(" ")
        instruction = Instruction(name, rest.strip())
        if name == "FROM":
            base, *alias = instruction.words
            stages.append(Stage(base, alias[1] if alias else None))
        else:
            stages[-1].instructions.append(instruction)
    return stages


def lint(text: str) -> Iterator[str]:
    """Yield what is wrong with a Containerfile."""
    stages = parse_stages(text)
    for stage in stages:
        if not re.fullmatch(r"[a-z0-9./-]+:\d[\w.-]*", stage.base):
            yield f"{stage.base}: a base needs a tag that is a version"
        for instruction in stage.instructions:
            yield from _lint_instruction(instruction)
    last = stages[-1]
    user = [words[0] for words in last.values("USER")]
    if not user or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user[-1]):
        yield "the last stage needs a USER that is a number other than 0, with its group"
    for name in ("ENTRYPOINT", "CMD", "VOLUME"):
        texts = [each.text for each in last.instructions if each.name == name]
        if len(texts) != 1 or not texts[0].startswith("["):
            yield f"the last stage needs one {name} in the JSON form"
    names = [each.name for each in last.instructions]
    if "RUN" in names[names.index("USER") if "USER" in names else 0 :]:
        yield "a RUN after USER makes no part of the system"


def _lint_instruction(instruction: Instruction) -> Iterator[str]:
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "RUN", "USER", "VOLUME", "WORKDIR"}
    if instruction.name not in known:
        yield f"{instruction.name} is not an instruction for here"
    if instruction.name == "COPY" and not instruction.text.startswith("--from="):
        for source in instruction.words[:-1]:
            if source == "." or not (ROOT / source).exists():
                yield f"COPY {source}: name files of the project, one by one"
    if instruction.name in ("ARG", "ENV") and re.search(r"(?i)key|token|password|secret", instruction.text):
        yield f"{instruction.name} {instruction.text}: an image keeps no secret"
    if instruction.name == "RUN" and re.search(r"\bpip install\b(?!.*--no-cache-dir)", instruction.text):
        yield f"RUN {instruction.text}: pip leaves its cache in the image"


@dataclass
class ImageBuilder:
    """Runs the steps of the stages in root folders below `folder`. `variables` are added to those of RUN."""

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    #: Folders of this machine that are mounted read-only, at the same path.
    extra_mounts: tuple[str, ...] = ()
    _lines: list[str] = field(default_factory=lambda: ["set -eu"])

    def build(self, stages: list[Stage]) -> Path:
        """Add all stages to the script, and return the root folder of the last one."""
        roots: dict[str, Path] = {}
        for number, stage in enumerate(stages):
            root = self.folder / f"root{number}"
            roots[stage.name or str(number)] = root
            self._prepare_base(root)
            environ, workdir = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root"}, "/"
            for instruction in stage.instructions:
                words = instruction.words
                if instruction.name in ("ENV", "ARG"):
                    environ |= dict(word.split("=", 1) for word in words)
                elif instruction.name == "WORKDIR":
                    workdir = words[0]
                    self._lines.append(f"mkdir -p {root}{workdir}")
                elif instruction.name == "COPY":
                    self._copy(words, root, workdir, roots)
                elif instruction.name == "RUN":
                    self._lines.append(self.command(root, workdir, environ, ["/bin/sh", "-c", instruction.text]))
        return root

    def command(
        self, root: Path, workdir: str, environ: Mapping[str, str], arguments: list[str], user: str = "0:0"
    ) -> str:
        """Return a shell line that runs a program in a root folder."""
        # This Python may look for its library where it was built, and find another one instead.
        values = {"LD_LIBRARY_PATH": "/usr/local/lib", **self.variables, **environ}
        inside = ["env", "-i", "-C", workdir, *(f"{name}={value}" for name, value in values.items()), *arguments]
        return shlex.join(["chroot", f"--userspec={user}", str(root), *inside])

    def run(self, *lines: str) -> subprocess.CompletedProcess[str]:
        """Run the script, and then these lines, with mounts of their own."""
        script = "\n".join([*self._lines, *lines])
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script],
            capture_output=True,
            text=True,
            check=False,
        )

    def _prepare_base(self, root: Path) -> None:
        """Make a root folder with the system's programs and this Python."""
        self._lines.append(f"mount --bind {root} {root}")  # so that it can become read-only
        for name in ("etc", "proc", "dev", "tmp", "root", "opt"):
            (root / name).mkdir(parents=True)
        # Before the other mounts: this checkout may itself be below /tmp.
        self._lines.append(f"mount -t tmpfs -o mode=1777 tmpfs {root / 'tmp'}")
        (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n", encoding="utf-8")
        (root / "etc" / "group").write_text("root:x:0:\n", encoding="utf-8")
        for name in ("resolv.conf", "pip.conf", "login.defs", "ssl", "ld.so.cache", "alternatives"):
            source = Path("/etc") / name
            if source.is_dir():
                shutil.copytree(source, root / "etc" / name, symlinks=True, ignore_dangling_symlinks=True)
            elif source.exists():
                shutil.copy(source, root / "etc" / name)
        for name in SYSTEM_FOLDERS:
            if (link := Path("/") / name).is_symlink():
                (root / name).symlink_to(link.readlink())
            elif link.is_dir():
                self._mount(f"/{name}", root)
        python = self.folder / "python"
        if not python.exists():
            shutil.copytree(sys.base_prefix, python, symlinks=True, ignore=LEFT_OUT)
            with suppress(FileExistsError):  # a name that the base image has, and not every system
                (python / "bin" / "python").symlink_to(f"python{sys.version_info.major}.{sys.version_info.minor}")
        self._lines.append(f"mount --bind {python} {root}/usr/local")
        for path in ("/proc", "/dev", *self.extra_mounts):
            self._mount(path, root)

    def _mount(self, path: str, root: Path) -> None:
        self._lines.append(f"mkdir -p {root}{path} && mount --rbind {path} {root}{path}")

    def _copy(self, words: list[str], root: Path, workdir: str, roots: Mapping[str, Path]) -> None:
        source_root = ROOT
        if words[0].startswith("--from="):
            source_root, words = roots[words[0].removeprefix("--from=")], words[1:]
        *sources, target = words
        into = Path(os.path.normpath(f"{root}{os.path.join(workdir, target)}"))  # noqa: PTH118 - a path in the root folder
        self._lines.append(f"mkdir -p {into if target.endswith('/') else into.parent}")
        self._lines += [f"cp -a {source_root}/{source.lstrip('/')} {into}" for source in sources]


def can_build() -> bool:
    """Return whether this process may make mounts of its own."""
    return (
        sys.platform == "linux"
        and os.geteuid() == 0
        and all(map(shutil.which, ("unshare", "chroot", "useradd", "mount")))
        and subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0
    )


def offline_settings() -> tuple[dict[str, str], tuple[str, ...]]:
    """Return variables and mounts by which pip installs the project alone: its dependencies are this Python's."""
    folders = [path for path in sys.path if Path(path).name == "site-packages"]
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0 turns the isolation off
    return pip | {"PYTHONPATH": ":".join(folders), "PIP_ROOT_USER_ACTION": "ignore"}, tuple(folders)


def run_image(folder: Path, variables: Mapping[str, str], mounts: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Build the image, and run the sample job in it: as its user, under a read-only root, with a volume."""
    stages = parse_stages(CONTAINERFILE.read_text(encoding="utf-8"))
    builder = ImageBuilder(folder, variables, mounts)
    root, last = builder.build(stages), stages[-1]
    environ = {name: value for words in last.values("ENV") for name, value in (word.split("=", 1) for word in words)}
    (user,), (workdir,), entry = last.values("USER")[-1], last.values("WORKDIR")[-1], last.values("ENTRYPOINT")[-1]
    data = folder / "volume"
    for name in ("jobs", "sample_data"):
        shutil.copytree(ROOT / name, data / name, ignore=shutil.ignore_patterns(".enrich"))
    arguments = ["run", "jobs/leads.yaml", "--sandbox", "--limit", "3", "--json"]
    return builder.run(
        f"chown -R {user} {data}",
        f"mount --bind {data} {root}{workdir}",
        f"mount -o remount,ro,bind {root} && ! touch {root}/opt/enrich/file 2>&-",
        builder.command(root, workdir, environ, [*entry, *arguments], user),
    )


def main() -> int:
    """Lint the Containerfile, and build and run it with the packages of the index."""
    problems = list(lint(CONTAINERFILE.read_text(encoding="utf-8")))
    print("\n".join(problems) or "Containerfile: no problems")
    if not can_build():
        print("its steps need root on Linux")
        return bool(problems)
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    with tempfile.TemporaryDirectory() as folder:
        done = run_image(Path(folder), pip, ())
    print(done.stdout[-2000:], done.stderr[-2000:])
    return done.returncode or bool(problems)


if __name__ == "__main__":
    sys.exit(main())
