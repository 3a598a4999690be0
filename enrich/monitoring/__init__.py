"""Monitoring of a run: progress bar, log file, metrics, healthcheck and notifications."""
