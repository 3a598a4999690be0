"""`enrich doctor`: checks that the next cron run of a job will work."""
