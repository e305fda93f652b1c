"""Masks, schedules, groups, rules and target density; arrays, trees, files and errors.

This package is for code that works on arrays, pytrees, paths and messages alone. A module belongs here if it needs no
layer, model, data set, optimizer or run, and is used by several of the other packages. Modules here import only each
other.
"""
