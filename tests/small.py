"""A search that trains in no time; the data and network for it are fixtures of conftest.py."""

from cs_jax.config import Config

SEARCH = Config(
    epochs=2,
    rounds=2,
    rewind_epoch=1,
    batch_size=16,
    lr=0.05,
    score_lr=5.0,
    lr_schedule=(),
    lr_drops=(),
    lmbda=1e-4,
    mask_initial_value=0.02,
    final_temp=50.0,
)
