"""The Databar API on loopback, with people, prices, latency and faults to choose; costs nothing and stands alone."""

from enrich.sandbox.faults import Fault
from enrich.sandbox.settings import SandboxSettings

__all__ = ["Fault", "SandboxSettings"]
