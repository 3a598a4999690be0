"""Tests of `enrich.rows`."""
