"""Tests of `enrich.job`."""
