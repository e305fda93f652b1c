"""Ticket files, and tools for tickets: shrinking, folding, inference speed, mask overlap and export."""
