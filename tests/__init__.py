"""Behaviour, over real HTTP and real files."""
