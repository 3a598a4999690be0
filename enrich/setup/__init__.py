"""Setting a job up: `enrich init` and `enrich check`."""
