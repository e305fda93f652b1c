"""Config, search, metrics, and one run."""
