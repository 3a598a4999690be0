"""Enrich a CSV of leads with a Databar.ai waterfall: resumable, never paying twice, losing no answer."""

__version__ = "0.1.0"
