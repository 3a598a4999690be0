"""Enriches a CSV of leads with a Databar.ai waterfall. Runs are resumable and never pay for the same lead twice."""

__version__ = "0.1.0"
