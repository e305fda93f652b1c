"""Grids of runs: what is in one (`spec`), how it is run (`scheduler`, `worker`), and what came of it (`results`)."""
