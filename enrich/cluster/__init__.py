"""Runs on a Ray cluster. Imported only when it is needed, because Ray is an optional extra."""
