"""Observers of a run: terminal, trackers, health checks, signals."""
