"""Decodes images to arrays of one size, with Pillow: a random crop for training, the middle square for evaluation."""

import io

import numpy as np

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for each number of channels."""

EVALUATION_SHARE = 224 / 256
"""Side of the middle square for evaluation, as a share of the image's shorter side; on ImageNet, 224 of 256 pixels."""

AREA, ASPECT, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Random crop: range of its share of the image's area, range of width / height, and draws before the middle is used."""


def decode(
    encoded: bytes, shape: tuple[int, int, int], size: int | None, random: np.random.Generator | None
) -> np.ndarray:
    """Decode an image to a uint8 array of a given shape.

    Args:
        encoded: bytes of an image file.
        shape: (height, width, channels) of the result.
        size: side of the square, in pixels, to resize to; None returns the whole image, which must have `shape`.
        random: draws a crop and a horizontal flip (with probability 1/2); None uses the middle, without a flip.

    Raises:
        Exception: of any type, from Pillow, if the bytes are not an image; ValueError if the image has another shape.
    """
    from PIL import Image

    height, width, channels = shape
    image = Image.open(io.BytesIO(encoded))
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if random is not None:
        box = random_box(random, *image.size)
    elif size is not None:
        box = middle_box(*image.size)
    else:
        box = None
    if box is not None:
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
    if pixels.shape != shape:
        raise ValueError(f"shape {pixels.shape}: must be {shape}")
    return pixels[:, ::-1] if random is not None and random.random() < 0.5 else pixels


def middle_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the middle square, whose side is 7/8 of the image's shorter side, in pixels.

    Resizing this square gives the same pixels as resizing the image's shorter side to 8/7 of the target size and then
    cropping the middle.

    >>> middle_box(480, 320)
    (100.0, 20.0, 380.0, 300.0)
    """
    side = EVALUATION_SHARE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(random: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop, in pixels: 8% to 100% of the image's area, sides 3:4 to 4:3.

    Area and the logarithm of the aspect ratio are uniform in `AREA` and `ASPECT`, as for Inception. If no crop fits
    after `ATTEMPTS` draws, the crop is in the middle, with the value in `ASPECT` nearest to the image's aspect ratio.
    """
    for _ in range(ATTEMPTS):
        area = width * height * random.uniform(*AREA)
        aspect = np.exp(random.uniform(*np.log(ASPECT)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ASPECT[1]))), min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
