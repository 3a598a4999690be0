"""Databar API: client, HTTP transport, credentials and response parsing."""
