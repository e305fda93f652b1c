"""Settings of the data set: which one, how it is split, read and augmented."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cs_jax.core.settings import COUNT, DATA_FILES, NOT_NEGATIVE, RUNTIME, SEED, SPEED, Settings
from cs_jax.data.images import AUGMENTATIONS


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Settings that loading and splitting a data set read."""

    dataset: str = "cifar10"
    """Data set: digits (part of scikit-learn), or a TensorFlow Datasets name with features `image` and `label`."""

    image_size: Annotated[int | None, COUNT] = None
    """Side of the square, in pixels, to which streamed images are cropped; None keeps images of one fixed shape."""

    stream: bool = False
    """Read images from their files during training, for a data set that does not fit on the device; images without a
    fixed shape are always streamed."""

    loader_threads: Annotated[int | None, SPEED, COUNT] = None
    """Threads that read and decode streamed images; None is one per core, at most 16."""

    data_dir: Annotated[Path | None, DATA_FILES] = None
    """Folder of prepared TensorFlow Datasets; None is $TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    val_set_size: Annotated[int, NOT_NEGATIVE] = 5000
    """Number of training examples held out for validation, balanced over classes where possible; 0 for none."""

    max_train_examples: Annotated[int | None, COUNT] = None
    """Largest number of training examples, drawn with the seed after the validation split; None is all."""

    augment: str = "flip-crop"
    """Augmentation: none, crop (pad by 4 black pixels, random crop), flip-crop (mirror half of the images, then crop),
    or for streamed images resized-crop (random part, resized, half of them mirrored)."""

    seed: Annotated[int, RUNTIME, SEED] = 0
    """Seed of all randomness: initial weights, validation split, shuffling, augmentation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("augment", AUGMENTATIONS)
