"""The report: one page that answers what was got, what it cost, who earned it and what needs a person."""
