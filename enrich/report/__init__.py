"""The report: one HTML page with match rate, spend, provider performance, and anything that needs action."""
