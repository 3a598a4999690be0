"""Tests: databar."""
