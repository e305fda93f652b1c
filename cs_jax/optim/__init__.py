"""Continuous Sparsification as an optax transformation, for the training loop of any JAX library.

This package contains the transformation, its state, and the functions that end a round of a search. Formulas on scores
and masks belong in `core`; the search of `python -m cs_jax` is in `experiment`.
"""
