"""Augmentation and normalisation on uint8 images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cs_jax.data import images

KEY = jax.random.key(0)
# Every pixel of an image is different, and none is black.
BATCH = jnp.arange(1, 2 * 6 * 5 * 2 + 1, dtype=jnp.uint8).reshape(2, 6, 5, 2).repeat(64, axis=0)


@pytest.mark.parametrize("name", images.AUGMENTATIONS)
def test_augmentation_keeps_shape_and_dtype(name: str) -> None:
    augmented = images.AUGMENTATIONS[name](KEY, BATCH)
    assert (augmented.shape, augmented.dtype) == (BATCH.shape, jnp.uint8)


def test_no_augmentation_changes_nothing() -> None:
    np.testing.assert_array_equal(images.AUGMENTATIONS["none"](KEY, BATCH), BATCH)


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    flipped = np.asarray(images.random_flip(KEY, BATCH))
    same = (flipped == BATCH).all(axis=(1, 2, 3))
    mirrored = (flipped == BATCH[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 40 < same.sum() < 88


def test_crop_shifts_each_image_by_up_to_four_pixels_and_fills_with_black() -> None:
    cropped = np.asarray(images.random_crop(KEY, BATCH))
    padded = np.pad(BATCH, ((0, 0), (4, 4), (4, 4), (0, 0)))
    seen = set()
    for image, source in zip(cropped, padded, strict=True):
        corners = [(y, x) for y in range(9) for x in range(9) if (source[y : y + 6, x : x + 5] == image).all()]
        assert corners
        seen.update(corners if len(corners) == 1 else [])
    assert {0, 8} <= {y for y, _ in seen} and {0, 8} <= {x for _, x in seen}


def test_flip_and_crop_is_the_flip_and_then_the_crop() -> None:
    flip_key, crop_key = jax.random.split(KEY)
    expected = images.random_crop(crop_key, images.random_flip(flip_key, BATCH))
    np.testing.assert_array_equal(images.flip_and_crop(KEY, BATCH), expected)


def test_normalisation_is_per_channel_in_the_dtype_of_the_constants() -> None:
    mean, std = jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([2.0, 4.0], jnp.bfloat16)
    normalised = images.normalize(jnp.full((1, 1, 1, 2), 10, jnp.uint8), mean, std)
    assert normalised.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normalised[0, 0, 0], [4.5, 2.0])
