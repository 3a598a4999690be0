"""One run: preflight, budget, submitting, polling, output, summary."""
