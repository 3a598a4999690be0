"""The ledger: stores every request, task, answer and credit in SQLite or PostgreSQL."""
