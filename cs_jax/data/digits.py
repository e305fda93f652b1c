"""The digits of scikit-learn."""

import numpy as np

from cs_jax.core.errors import ConfigError
from cs_jax.data.config import DataConfig
from cs_jax.data.split import Split, check_resident


def load_digits(config: DataConfig) -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 16 grey levels spread over 0 to 255; a fifth, always the same, is the test set."""
    if config.stream:
        raise ConfigError("--stream: got digits, wanted a set of TensorFlow Datasets: digits are in no file to read")
    check_resident(config, "digits are kept as they are")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    everything = Split(images, labels.astype(np.int32))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return everything[np.asarray(train)], everything[np.asarray(test)], tuple("0123456789")
