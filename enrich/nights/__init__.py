"""Every night: `enrich cron` and `enrich doctor`."""
