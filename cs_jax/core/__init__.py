"""Masks, schedules, groups, rules and target density; arrays, trees, files and errors."""
