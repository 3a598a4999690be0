"""Tests of `enrich.ledger`."""
