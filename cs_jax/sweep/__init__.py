"""Grids of runs: their spec, the scheduler and its workers, results, statistics, and several runs in one program."""
