"""Tests of `enrich.cluster`."""
