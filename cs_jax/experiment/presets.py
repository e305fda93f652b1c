"""Presets of the command line, and the flags that a method ignores."""

from cs_jax.core.errors import in_words
from cs_jax.core.settings import flag
from cs_jax.data.images import RESIZED_CROP
from cs_jax.experiment.config import Config
from cs_jax.methods.controls import DENSE

PRESETS: dict[str, Config] = {
    "digits": Config(
        preset="digits",
        dataset="digits",
        model="resnet6",
        val_set_size=180,
        augment="none",
        batch_size=64,
        epochs=15,
        lr_schedule=(10, 13),
        lmbda=1e-5,
        mask_initial_value=-0.03,
        score_lr=1.0,
        controls=(DENSE,),
    ),
    "fashion-mnist": Config(
        preset="fashion-mnist",
        dataset="fashion_mnist",
        model="resnet8",
        augment="flip-crop",
        epochs=30,
        lr_schedule=(20, 25),
    ),
    "cifar10": Config(),
    # Batch size, learning rate, decay, epochs and drops have the usual values for ResNets on ImageNet (Goyal et al.,
    # 2017, arXiv:1706.02677, without the warm-up). Rounds, temperature and the other settings of the method have the
    # paper's values for CIFAR-10, because the paper's values for ImageNet are unknown.
    "imagenet-resnet50": Config(
        preset="imagenet-resnet50",
        dataset="imagenet2012",
        image_size=224,
        model="resnet50",
        val_set_size=10000,
        augment=RESIZED_CROP,
        batch_size=256,
        epochs=90,
        lr_schedule=(30, 60, 80),
        lr_drops=(0.1, 0.1, 0.1),
    ),
}
"""Config of `train.py PRESET`, by name. Flags override its settings."""

DEFAULT_PRESET = "digits"


def without_effect(config: Config) -> list[str]:
    """Flags and values that differ from the preset and that the method ignores."""
    usual = PRESETS.get(config.preset, PRESETS[DEFAULT_PRESET])
    given = [name for name in config.unused if getattr(config, name) != getattr(usual, name)]
    return [f"{flag(name)} {in_words(getattr(config, name))}" for name in given]
