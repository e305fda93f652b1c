"""Masks, schedules, groups, rules and target density; arrays, trees, files and errors.

Code here works only on arrays, pytrees, paths and messages. A module belongs here if it needs no layer, model, data
set, optimizer or run, and if more than one other package uses it. From cs_jax, modules here import only modules of this
package.
"""
