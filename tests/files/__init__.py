"""Tests of `enrich.files`."""
