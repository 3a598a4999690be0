"""Tests of `enrich.run`."""
