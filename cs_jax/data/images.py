"""Images on the device: stored as uint8, augmented on the device, then normalised."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import ArrayLike

CROP_PADDING = 4  # pixels on every side, as in the authors' code for CIFAR-10


class ImageSet(struct.PyTreeNode):
    """Labelled images on the device, with the constants that normalise them.

    Attributes:
        images: (n, height, width, channels) uint8.
        labels: (n,) int32, classes from 0.
        mean: (channels,) float, in units of a pixel (0 to 255), subtracted.
        std: (channels,) float, in units of a pixel, divided by. Its dtype is the dtype of the network's input.
    """

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    def take(self, indices: ArrayLike) -> "ImageSet":
        """Examples at `indices`, (n,) integers, in this order."""
        return self.replace(images=self.images[indices], labels=self.labels[indices])


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Network input `(images - mean) / std`, (n, height, width, channels) of the dtype of `mean`.

    >>> normalize(jnp.array([[[[10], [30]]]], jnp.uint8), jnp.array([10.0]), jnp.array([2.0]))[0, 0, :, 0]
    Array([ 0., 10.], dtype=float32)
    """
    return (images.astype(mean.dtype) - mean.reshape(1, 1, 1, -1)) / std.reshape(1, 1, 1, -1)


def random_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image padded with 4 black pixels on every side, then cropped to its old size at a random position.

    Args:
        key: PRNG key.
        images: (n, height, width, channels) uint8. Not normalised, so that zeros are black.

    Returns:
        Array like `images`.
    """
    n, *shape = images.shape
    padding = (CROP_PADDING, CROP_PADDING)
    padded = jnp.pad(images, ((0, 0), padding, padding, (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * CROP_PADDING + 1)
    return jax.vmap(lambda image, corner: lax.dynamic_slice(image, (*corner, 0), shape))(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored left to right with probability 1/2; arguments and result as in `random_crop`."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def flip_and_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """`random_flip`, then `random_crop`: the authors' augmentation of CIFAR-10."""
    flip_key, crop_key = jax.random.split(key)
    return random_crop(crop_key, random_flip(flip_key, images))


RESIZED_CROP = "resized-crop"
"""Augmentation of streamed images, done on the host during decoding; its function for the device does nothing."""

AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": lambda key, images: images,
    "crop": random_crop,
    "flip-crop": flip_and_crop,
    RESIZED_CROP: lambda key, images: images,
}
"""Choices of `--augment`: functions of a PRNG key and uint8 images that keep shape and dtype."""
