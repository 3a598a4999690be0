"""The job: its YAML file, its settings and the locations of its files."""
