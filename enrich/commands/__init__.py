"""The commands of `enrich`: their words and options; no logic."""
