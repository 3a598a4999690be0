"""Counts credits in whole millionths, so that sums come out even, and shows them as the API does."""

from decimal import Decimal

MILLION = 1_000_000


def to_micros(amount: Decimal | float | str) -> int:
    """Take an amount as the API or a person writes it."""
    return int((Decimal(str(amount)) * MILLION).to_integral_value())


def to_number(amount: int) -> float:
    """Show an amount as a JSON number."""
    return amount / MILLION


def to_text(amount: int) -> str:
    """Show an amount as the steps of a result do, such as `1.0`."""
    return str(amount / MILLION)
