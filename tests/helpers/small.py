"""A small search (data and network are fixtures of conftest.py), an epoch record, and a limit on file sizes."""

import contextlib
import resource
from collections.abc import Iterator

from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import EpochRecord

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

RECORD = EpochRecord(
    phase="search",
    round=0,
    epoch=2,
    temperature=50.0,
    learning_rate=0.05,
    loss=2.0,
    penalty=0.5,
    density=0.5,
    layer_density={"hidden0": 0.5},
    flip_rate=None,
    soft_accuracy=0.9,
    hard_accuracy=None,
    images_per_second=100.0,
    seconds=1.0,
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
