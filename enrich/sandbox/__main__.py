"""Lets `python -m enrich.sandbox` serve the sandbox."""

from enrich.sandbox.command import sandbox

sandbox(prog_name="python -m enrich.sandbox")
