"""Handwritten digits of scikit-learn."""

import contextlib
from collections.abc import Iterator

import numpy as np

from cs_jax.data.config import DataConfig
from cs_jax.data.source import Examples
from cs_jax.data.split import Split


@contextlib.contextmanager
def opened(config: DataConfig, *splits: str) -> Iterator[Examples]:
    """Context manager: scikit-learn's 1,797 digits, 8x8 pixels, with 17 grey levels from 0 to 255.

    The test split has 360 digits, the same for every seed.
    """
    del config
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    everything = Split(images, labels.astype(np.int32))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    indices = {"train": np.asarray(train), "test": np.asarray(test)}
    yield Examples(tuple(everything[indices[split]] for split in splits), tuple("0123456789"))
