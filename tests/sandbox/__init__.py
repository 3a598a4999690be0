"""Tests of the sandbox: as strict and as faulty as the real API."""
