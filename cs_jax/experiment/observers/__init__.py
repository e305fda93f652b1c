"""Observers of a run: terminal output, warnings about the search, trackers, and signals."""
