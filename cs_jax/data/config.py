"""Settings of the data set: name, split, reading and augmentation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cs_jax.core.settings import COUNT, DATA_FILES, NOT_NEGATIVE, RUNTIME, SEED, SPEED, Settings
from cs_jax.data.images import AUGMENTATIONS


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Settings for loading, splitting and augmenting a data set."""

    dataset: str = "cifar10"
    """Data set: digits (part of scikit-learn), or a TensorFlow Datasets name with features `image` and `label`."""

    image_size: Annotated[int | None, COUNT] = None
    """Side, in pixels, of the square to which streamed images are cropped and resized. None keeps the shape of the
    images, which must be the same for all images."""

    stream: bool = False
    """Read images from their files during training, for a data set that does not fit on the device. Images without a
    fixed shape are always streamed."""

    loader_threads: Annotated[int | None, SPEED, COUNT] = None
    """Threads that read and decode streamed images; None is one per CPU core, at most 16."""

    data_dir: Annotated[Path | None, DATA_FILES] = None
    """Folder of prepared TensorFlow Datasets; None is $TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    val_set_size: Annotated[int, NOT_NEGATIVE] = 5000
    """Number of training examples held out for validation; 0 for none. The examples are balanced over classes, but
    streamed examples are drawn at random."""

    max_train_examples: Annotated[int | None, COUNT] = None
    """Maximum number of training examples, drawn with the seed after the validation split; None is all."""

    augment: str = "flip-crop"
    """Augmentation: none, crop (pad by 4 black pixels, random crop), flip-crop (mirror with probability 1/2, then
    crop), or, for streamed images only, resized-crop (random crop, resize, mirror with probability 1/2)."""

    seed: Annotated[int, RUNTIME, SEED] = 0
    """Seed of all randomness: initial weights, validation split, shuffling, augmentation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("augment", AUGMENTATIONS)
