"""Images on the host and between value ranges: crop, uint8 <-> float, grids, PNG files."""

import numpy as np
from PIL import Image

from utils import files

LONG = 16  # times the short side: a picture that is longer would fill the memory when scaled


def center_crop(image, size):
    """Scales the short side of a PIL image to `size` and cuts out the middle: (size, size).

    ADM's preprocessing, which the published FID statistics rest on (Dhariwal & Nichol 2021,
    guided-diffusion, image_datasets.py): halve with a box filter while the short side is at
    least `2 * size`, then bicubic to the exact scale, then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) > LONG * size:  # the same, to rounding, without all that is cut off
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def to_float(images):
    """Turns uint8 [0, 255] into float32 [-1, 1], numpy or jax, any shape."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(images, rounding="nearest"):
    """Turns float [-1, 1] into uint8, numpy or jax, any shape.

    `nearest`: `clip(127.5 x + 128, 0, 255)` truncated, the published sampler's; it is the inverse
    of `to_float` on its values. `down`: `clip(127.5 (x + 1), 0, 255)` truncated, ADM's, half a
    level darker.
    """
    offset = 128 if rounding == "nearest" else 127.5
    return (127.5 * images.astype("float32") + offset).clip(0, 255).astype("uint8")


def grid(images, columns):
    """Lays images uint8 (N, h, w, c) out row by row -> (H, W, c); an unfilled rest is black."""
    images = np.asarray(images)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, h, w, c), images.dtype)
    cells[:n] = images
    cells = cells.reshape(rows, columns, h, w, c).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * h, columns * w, c)


def stretched(array):
    """Maps the least number of an array to -1 and the largest to 1."""
    low = array.min()
    return (array - low) / max(array.max() - low, 1e-6) * 2 - 1


def fitted(images, shape):
    """Brings images uint8 (N, h, w, c) to (N, *shape) for people: repeats or leaves out pixels.

    Gray becomes colours by repeating it, colours gray by their mean; else the first channels count.
    """
    images, (H, W, C) = np.asarray(images), shape
    rows, columns = (np.arange(n) * m // n for n, m in zip((H, W), images.shape[1:3], strict=True))
    images = images[:, rows][:, :, columns]
    if images.shape[-1] != C:
        gray = images.mean(axis=-1, keepdims=True) if C == 1 else images[..., :1]
        images = images[..., :C] if images.shape[-1] > C > 1 else gray.repeat(C, axis=-1)
    return images.astype(np.uint8)


def save_png(path, image):
    """Writes one image uint8 (h, w, c), c = 1 or 3, as PNG; the file appears complete or not."""
    image = np.asarray(image)
    if image.shape[-1] == 1:
        image = image[..., 0]
    with files.complete(path) as unfinished:
        Image.fromarray(image).save(unfinished, format="PNG")
