"""Sweeps (grids of runs): spec, scheduler and workers, results, statistics, and several runs in one program."""
