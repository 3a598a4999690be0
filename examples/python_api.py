"""Checks, plans and runs a job from Python. Usage: python examples/python_api.py JOB [--sandbox]."""

from __future__ import annotations

import sys

import enrich


def show(progress: enrich.Progress) -> None:
    """Print the progress of a run on one line."""
    print(f"\r{progress.done} of {progress.total or '?'}", end="", file=sys.stderr)


def main(job: str, *, sandbox: bool) -> int:
    """Run the job if it has no problems; return the exit code that `enrich run` would have."""
    try:
        checked = enrich.check_job(job, sandbox=sandbox)
        for problem in checked.problems:
            print(f"{problem.message}; {problem.hint or ''}", file=sys.stderr)
        if checked.problems:
            return checked.exit_code
        plan = enrich.plan_job(job, sandbox=sandbox)
        print(f"{plan.to_submit} requests to send, at most {plan.cost.maximum} credits")
        summary = enrich.run_job(job, sandbox=sandbox, max_credits=plan.cost.maximum, on_progress=show)
    except enrich.LedgerLocked:
        return 0  # another run is working on it
    except enrich.EnrichError as error:
        print(f"{error.message}; {error.hint or ''}", file=sys.stderr)
        return error.exit_code
    print(f"{summary.found} of {summary.rows} rows found for {summary.credits_spent} credits: {summary.output}")
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sandbox="--sandbox" in sys.argv[2:]))
