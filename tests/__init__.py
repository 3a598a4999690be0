"""Tests of behavior over real HTTP and real files."""
