"""Config of a small search, whose data and network are fixtures of conftest.py, and a limit on file sizes."""

import contextlib
import resource
from collections.abc import Iterator

from cs_jax.experiment.config import Config

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


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside the context no file can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
