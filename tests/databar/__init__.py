"""Tests of `enrich.databar`."""
