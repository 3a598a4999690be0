"""Tests of rows and requests."""
