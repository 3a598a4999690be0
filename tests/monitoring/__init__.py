"""Tests of `enrich.monitoring`."""
