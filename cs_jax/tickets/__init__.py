"""Ticket files; tickets as smaller networks; speed, overlap and export."""
