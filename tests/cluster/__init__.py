"""Tests of runs over several workers."""
