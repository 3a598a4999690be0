"""Enriches a CSV of leads with a Databar.ai waterfall. Runs are resumable and never pay for the same lead twice.

The Python API is `run_job`, `run_job_async`, `plan_job` and `check_job`. What it needs is imported when it is used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from enrich.api import check_job, plan_job, run_job, run_job_async
    from enrich.commands.check_target import CheckResult
    from enrich.errors import (
        ApiKeyRejected,
        ApiUnreachable,
        ClusterFailed,
        CommandRefused,
        EnrichError,
        Interrupted,
        JobError,
        LedgerFailed,
        LedgerLocked,
    )
    from enrich.exit_codes import ExitCode
    from enrich.run.plan import Plan
    from enrich.run.progress import Progress
    from enrich.run.summary import RunSummary

__version__ = "0.1.0"
__all__ = [
    "ApiKeyRejected",
    "ApiUnreachable",
    "CheckResult",
    "ClusterFailed",
    "CommandRefused",
    "EnrichError",
    "ExitCode",
    "Interrupted",
    "JobError",
    "LedgerFailed",
    "LedgerLocked",
    "Plan",
    "Progress",
    "RunSummary",
    "check_job",
    "plan_job",
    "run_job",
    "run_job_async",
]

if not TYPE_CHECKING:  # otherwise a type checker would accept every name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'enrich' has no attribute '{name}'")
        if sys.platform == "win32":
            raise ImportError("Windows is not supported: run enrich in WSL (Windows Subsystem for Linux), as on Linux")
        value = getattr(import_module("enrich.errors"), name, None)
        return getattr(import_module("enrich.api"), name) if value is None else value

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
