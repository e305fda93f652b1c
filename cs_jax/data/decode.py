"""Encoded images to arrays of one size, with Pillow: a part at random for training, the middle for evaluation."""

import io

import numpy as np

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's modes by number of channels."""

EVALUATION_SHARE = 224 / 256
"""Side of the square that is evaluated, in shorter sides of the image: 224 of 256 pixels, as on ImageNet."""

AREA, ASPECT, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Of a random crop: share of the image, width over height, and draws before the middle is taken instead."""


def decode(
    encoded: bytes, shape: tuple[int, int, int], size: int | None, random: np.random.Generator | None
) -> np.ndarray:
    """An encoded image as uint8 array of a shape: cut at random, or its middle, or the whole where it is not resized.

    Raises:
        Exception: of Pillow's, of any kind, if these are no image's bytes; or it has another shape.
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
        raise ValueError(f"shape {pixels.shape}, wanted {shape}")
    return pixels[:, ::-1] if random is not None and random.random() < 0.5 else pixels


def middle_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is evaluated: the middle square, 7/8 of the shorter side.

    To resize it is to resize the image to a shorter side of 8/7 of the size and to cut out the middle.

    >>> middle_box(480, 320)
    (100.0, 20.0, 380.0, 300.0)
    """
    side = EVALUATION_SHARE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(random: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part of an image, in pixels: of 8% to all of its area, near square.

    Area and the logarithm of the aspect are uniform in `AREA` and `ASPECT`, as in Inception; where the part does not
    fit in after `ATTEMPTS` draws it is the middle, of the nearest aspect.
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
