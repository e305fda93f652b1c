"""The optax transformation: Continuous Sparsification in a training loop of any JAX library."""
