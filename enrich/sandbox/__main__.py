"""Serves the sandbox as `python -m enrich.sandbox`."""

from enrich.sandbox.command import sandbox

sandbox(prog_name="python -m enrich.sandbox")
