"""Databar."""
