"""Converts credits to whole millionths, so that sums are exact, and back to the API's formats."""

from decimal import Decimal

MILLION = 1_000_000


def to_micros(amount: Decimal | float | str) -> int:
    """Convert credits, as the API or a user writes them, to millionths."""
    return int((Decimal(str(amount)) * MILLION).to_integral_value())


def to_number(amount: int) -> float:
    """Convert millionths to credits as a JSON number."""
    return amount / MILLION
