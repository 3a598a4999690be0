"""Tests of logs, metrics and notifications."""
