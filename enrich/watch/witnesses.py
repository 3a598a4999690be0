"""All who are told of a run's start, its notes and its end: log, metrics, healthcheck, people. None can break it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from enrich import __version__
from enrich.errors import Exit
from enrich.job import Job
from enrich.model import iso
from enrich.receipt import Receipt
from enrich.slip import lines
from enrich.store.history import History, glance
from enrich.surroundings import Options, Progress
from enrich.watch import metrics, outcome
from enrich.watch.healthcheck import Healthcheck
from enrich.watch.notify import Notifier, read_addresses
from enrich.watch.runlog import Log, without_data

SUCCESS = ("enrich_last_success_timestamp_seconds", "")


@dataclass(slots=True)
class Witnesses:
    """The witnesses of one run; a run of the sandbox has its log only.

    `say` shows the person what one of them could not do; `target` is the job as advice names it.
    """

    log: Log
    say: Callable[[str], None]
    target: outcome.Target
    job: Job | None = None
    _began: float = field(default_factory=time.time)
    _earlier: int | None = None
    _execution: int | None = None
    _metrics: Path | None = None
    _healthcheck: Healthcheck | None = None
    _notifier: Notifier | None = None
    _ended: bool = False

    def start(self, job: Job, options: Options, *, sandbox: bool) -> None:
        """Hear which job it is, before anything happens. Raises JobError when a witness can't be told."""
        self.job = job
        self.log.job = job.name
        self.log.line("start", **_setting(job, options), sandbox=sandbox)
        model = job.model
        if sandbox:
            return
        if model.healthcheck is not None:
            try:
                self._healthcheck = Healthcheck(model.healthcheck)
            except ValueError as error:
                raise job.error(["healthcheck"], str(error), "as in https://hc.example/your-uuid") from error
        if model.notify is not None:
            self._notifier, problems = read_addresses(job.path(model.notify))
            for problem in problems:
                self.complain(problem)
        if model.metrics is not None:
            if not model.metrics.endswith(".prom"):
                message = f"`{model.metrics}` would not be read: the textfile collector takes *.prom only"
                raise job.error(["metrics"], message, "let its name end in .prom")
            self._metrics = job.path(model.metrics)
            if self._metrics.exists() and not self._metrics.is_file():
                raise job.error(["metrics"], f"{self._metrics}: the metrics cannot be written: it is no file")

    def admitted(self) -> None:
        """Hear that the run holds its ledger: it begins now."""
        self._earlier = self._newest()
        if self._healthcheck is not None:
            self._healthcheck.start()

    def tell(self, note: str) -> None:
        """Hear what the person should know."""
        self.log.line("note", execution=self._number(), text=note)

    def show(self, progress: Progress) -> None:
        """Hear how far the run is."""
        self.log.progress(progress, self._number)

    def skipped(self, reason: str) -> None:
        """Hear that the run left its turn to another (`--if-locked skip`): nobody else needs to know."""
        self._ended = True
        self.log.line("end", exit_code=int(Exit.OK), skipped=reason)

    def end(self, receipt: Receipt) -> None:
        """Hear how an execution ended."""
        self._ended = True
        told = {name: value for name, value in receipt.as_json().items() if name not in ("error", "hint")}
        error = None if receipt.error is None else without_data(receipt.error)
        self.log.line("end", execution=receipt.execution, exit_code=receipt.exit_code, error=error, receipt=told)
        counts = [] if receipt.rows is None else lines(receipt)
        needed = outcome.needs(receipt.exit_code, told, self.target)
        self._spread(receipt.exit_code, metrics.of_receipt(told), error, counts, needed)

    def failed(self, code: int, message: str) -> None:
        """Hear that the run ended before an execution could say how."""
        if self._ended:
            return
        self._ended = True
        error = without_data(message)
        self.log.line("error", execution=self._number(), exit_code=code, error=error)
        before = {} if self._metrics is None else metrics.read(self._metrics)
        self._spread(code, before, error, [], outcome.needs(code, {}, self.target))

    def _spread(
        self, code: int, samples: metrics.Samples, error: str | None, told: list[str], needed: list[outcome.Need]
    ) -> None:
        """Tell those who are not here."""
        if self.job is None:
            return
        name = self.job.name
        summary = f"{name}: exit {code} ({outcome.word(code)})"
        if self._metrics is not None:
            self._write_metrics(self._metrics, code, samples)
        if self._healthcheck is not None:
            counts = [" ".join(line.split()) for line in told if line and not line.startswith("  output")]
            self.complain(self._healthcheck.end(code, "; ".join([summary, *counts])))
        if self._notifier is not None and outcome.needs_a_person(code):
            text = [*([error] if error else []), *told, "", *outcome.advice(needed)]
            self.complain(self._notifier.send(f"enrich {name}: {outcome.word(code)} (exit {code})", "\n".join(text)))

    def _write_metrics(self, path: Path, code: int, samples: metrics.Samples) -> None:
        before = metrics.read(path).get(SUCCESS)
        now = time.time()
        known = samples | self._of_ledger()
        known |= {
            ("enrich_last_start_timestamp_seconds", ""): self._began,
            ("enrich_last_end_timestamp_seconds", ""): now,
            ("enrich_exit_code", ""): code,
        }
        if code in outcome.FINE:
            known[SUCCESS] = now
        elif SUCCESS not in known and before is not None:
            known[SUCCESS] = before
        try:
            metrics.write(path, self._job().name, known)
        except OSError as error:
            self.complain(f"{path}: the metrics cannot be written: {error.strerror}")

    def _of_ledger(self) -> metrics.Samples:
        """Take what the ledger knows; nothing when it can't be read."""
        job = self._job()
        totals = glance(job.ledger, History.totals)
        last = glance(job.ledger, lambda history: history.last_end(job.name, outcome.FINE))
        known = metrics.of_ledger(totals) if totals is not None else {}
        return known if last is None else known | {SUCCESS: last / 1000}

    def _number(self) -> int | None:
        """The execution's number, once it has one."""
        if self._execution is None and self._earlier is not None:
            newest = self._newest()
            self._execution = newest if newest > self._earlier else None
        return self._execution

    def _newest(self) -> int:
        return glance(self._job().ledger, History.newest) or 0

    def _job(self) -> Job:
        assert self.job is not None  # noqa: S101 - all who ask have been told which it is
        return self.job

    def complain(self, problem: str | None) -> None:
        """Hear what could not be done beside the run, if anything: the log and the person are told."""
        if problem is not None:
            self.log.line("note", text=problem)
            self.say(f"note: {problem}")


def _setting(job: Job, options: Options) -> dict[str, Any]:
    """What the run is given, without its secrets: no address, no key."""
    wishes = {
        each.name: getattr(options, each.name) for each in fields(options) if each.name not in ("confirm", "plan")
    }
    return {
        "version": __version__,
        "job_file": str(job.document.path.absolute()),
        "input": str(job.input_path),
        "output": str(job.output_path(datetime.now().astimezone())),
        "ledger": str(job.ledger),
        "options": {name: sorted(value) if isinstance(value, frozenset) else value for name, value in wishes.items()}
        | {"max_credits": job.max_credits, "plan": None if options.plan is None else iso(options.plan.made_ms)},
    }
