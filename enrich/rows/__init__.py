"""Rows of the input: reads, filters and suppresses rows, looks them up and builds their requests."""
