"""`enrich init`: samples a CSV, matches its columns to the params of a waterfall and writes a job file."""
