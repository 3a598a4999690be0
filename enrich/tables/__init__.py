"""Tables in files: CSV, JSON Lines, Parquet and Excel, read and written alike."""
