"""Reads input tables and writes output files in all supported formats, locally and in object storage."""
