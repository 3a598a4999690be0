"""Rows of the input: reading, requests, lookup, suppression."""
