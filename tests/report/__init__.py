"""Tests of `enrich.report`."""
