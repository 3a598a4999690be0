"""A fake Databar API on loopback with configurable people, prices, latency and faults; free, independent of enrich."""

from enrich.sandbox.settings import Fault, SandboxSettings

__all__ = ["Fault", "SandboxSettings"]
