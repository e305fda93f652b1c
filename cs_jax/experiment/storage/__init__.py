"""Files of a run: config, metrics, checkpoints."""
