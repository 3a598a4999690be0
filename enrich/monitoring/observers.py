"""Sends a run's start, notes and end to log, metrics, healthcheck and notifications. A failure there ends no run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from enrich import __version__, exit_codes
from enrich.errors import JobError
from enrich.exit_codes import ExitCode
from enrich.job.job import Job
from enrich.ledger import records
from enrich.ledger.database import try_read
from enrich.models import iso_time
from enrich.monitoring import prometheus
from enrich.monitoring.log_file import RunLog, redact_message
from enrich.run.context import RunOptions
from enrich.run.progress import Progress
from enrich.run.summary import RunSummary, format_summary

if TYPE_CHECKING:
    from enrich.monitoring.notifications import Healthcheck, Notifier


@dataclass(slots=True)
class RunObservers:
    """The observers of one run; a sandbox run has only its log.

    `show_note` shows an observer's failure to the user. `job_arguments` is the job as suggested commands name it.
    """

    log: RunLog
    show_note: Callable[[str], None]
    job_arguments: exit_codes.JobArguments
    job: Job | None = None
    _started_at: float = field(default_factory=time.time)
    _previous_execution: int | None = None
    _execution: int | None = None
    _metrics_path: Path | None = None
    _healthcheck: Healthcheck | None = None
    _notifier: Notifier | None = None
    _ended: bool = False

    def start(self, job: Job, options: RunOptions) -> None:
        """Set the job and log the start. Raises JobError when an observer's setting in the job file is unusable."""
        self._check_log_file(job)
        self.job = job
        self.log.job = job.name
        self.log.write_event("start", **_run_settings(job, options), sandbox=job.sandbox)
        model = job.model
        if job.sandbox:
            return
        if model.healthcheck is not None:
            from enrich.monitoring.notifications import Healthcheck  # noqa: PLC0415 - its HTTP client is slow to import

            try:
                self._healthcheck = Healthcheck(model.healthcheck)
            except ValueError as error:
                raise job.error(["healthcheck"], str(error), "as in https://hc.example/your-uuid") from error
        if model.notify is not None:
            from enrich.monitoring.notifications import read_addresses  # noqa: PLC0415 - likewise

            self._notifier, problems = read_addresses(job.resolve_path(model.notify))
            for problem in problems:
                self.report_problem(problem)
        if model.metrics is not None:
            self._metrics_path = prometheus.find_metrics_path(job, model.metrics)

    def _check_log_file(self, job: Job) -> None:
        if self.log.path is None:
            return
        try:
            job.check_not_own(self.log.path.absolute(), "log", "choose another `--log-file`")
        except JobError:
            self.log.stop_writing()
            raise

    def lock_acquired(self) -> None:
        """Ping the healthcheck: the run has locked its ledger and begins."""
        self._previous_execution = self._newest_execution()
        if self._healthcheck is not None:
            self._healthcheck.start()

    def note(self, text: str) -> None:
        """Log a note that the user sees, too."""
        self.log.write_event("note", execution=self._execution_id(), text=text)

    def show_progress(self, progress: Progress) -> None:
        """Log the progress of the run."""
        self.log.write_progress(progress, self._execution_id)

    def skipped(self, reason: str) -> None:
        """Log that this run was skipped because another one runs (`--if-locked skip`); nothing else is sent."""
        self._ended = True
        self.log.write_event("end", exit_code=int(ExitCode.OK), skipped=reason)

    def end(self, summary: RunSummary) -> None:
        """Log and send the end of an execution."""
        self._ended = True
        values = {name: value for name, value in summary.as_json().items() if name not in ("error", "hint")}
        error = None if summary.error is None else redact_message(summary.error)
        self.log.write_event(
            "end", execution=summary.execution, exit_code=summary.exit_code, error=error, receipt=values
        )
        summary_lines = [] if summary.rows is None else format_summary(summary)
        actions = exit_codes.required_actions(summary.exit_code, summary.as_json(), self.job_arguments)
        self._notify_all(summary.exit_code, prometheus.samples_from_summary(values), error, summary_lines, actions)

    def failed(self, code: int, message: str) -> None:
        """Log and send the failure of a run that ended without a summary."""
        if self._ended:
            return
        self._ended = True
        error = redact_message(message)
        self.log.write_event("error", execution=self._execution_id(), exit_code=code, error=error)
        samples = {} if self._metrics_path is None else prometheus.read_metrics(self._metrics_path)
        self._notify_all(code, samples, error, [], exit_codes.required_actions(code, {}, self.job_arguments))

    def _notify_all(
        self,
        code: int,
        samples: prometheus.Samples,
        error: str | None,
        summary_lines: list[str],
        actions: list[exit_codes.RequiredAction],
    ) -> None:
        """Write metrics, ping the healthcheck and send notifications."""
        if self.job is None:
            return
        name = self.job.name
        headline = f"{name}: exit {code} ({exit_codes.exit_label(code)})"
        if self._metrics_path is not None:
            try:
                prometheus.update_metrics(self._metrics_path, self.job, samples, code, self._started_at)
            except OSError as failure:
                self.report_problem(f"{self._metrics_path}: the metrics cannot be written: {failure.strerror}")
        if self._healthcheck is not None:
            counts = [" ".join(line.split()) for line in summary_lines if line and "→" not in line]
            self.report_problem(self._healthcheck.end(code, "; ".join([headline, *counts])))
        if self._notifier is not None and exit_codes.requires_action(code):
            text = [*([error] if error else []), *summary_lines, "", *exit_codes.format_actions(actions)]
            self.report_problem(
                self._notifier.send(f"enrich {name}: {exit_codes.exit_label(code)} (exit {code})", "\n".join(text))
            )

    def _execution_id(self) -> int | None:
        """Return the execution's id; None before it has one."""
        if self._execution is None and self._previous_execution is not None:
            newest = self._newest_execution()
            self._execution = newest if newest > self._previous_execution else None
        return self._execution

    def _newest_execution(self) -> int:
        assert self.job is not None  # noqa: S101 - callers run after `start`
        return try_read(self.job.ledger, records.newest_execution_id) or 0

    def report_problem(self, problem: str | None) -> None:
        """Log an observer's failure and show it to the user; None: no failure."""
        if problem is not None:
            self.log.write_event("note", text=problem)
            self.show_note(problem)


def _run_settings(job: Job, options: RunOptions) -> dict[str, Any]:
    """Return the settings of the run as JSON values, without secrets: no addresses of notifications, no key."""
    run_options = asdict(options)
    for name in ("confirm", "confirm_new_ledger", "cluster"):
        del run_options[name]
    run_options |= {
        "retry": sorted(options.retry),
        "spread": None if options.cluster is None else asdict(options.cluster),
        "max_credits": job.max_credits,
        "plan": None if options.plan is None else iso_time(options.plan.made_ms),
    }
    return {
        "version": __version__,
        "job_file": str(job.document.path.absolute()),
        "input": str(job.input_path),
        "output": str(job.output_path(datetime.now().astimezone())),
        "ledger": str(job.ledger),
        "options": run_options,
    }
