"""The ledger: its file, its moves, and those who only look into it."""
