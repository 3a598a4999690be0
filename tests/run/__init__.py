"""Tests of the run loop."""
