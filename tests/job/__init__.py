"""Tests: job."""
