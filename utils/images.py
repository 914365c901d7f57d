"""Images on the host and between value ranges: crop, uint8 <-> float, grids, PNG files."""

import itertools

import numpy as np
from PIL import Image, ImageDraw

from utils import files

CURVES = 48, 72  # pixels of the picture of a signal: height and width
COLOURS = ("#1f5fa8", "#c4501b", "#2e8540", "#7a3e9d")  # of its channels, in turn
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


def shown(values):
    """Makes images uint8 (N, H, W, 1 or 3) of values (N, h, w, c); those of bytes are they.

    Signals, h = 1, are drawn as curves, one for each channel; of fields the first channels are
    shown. Dark, or the bottom, is the lowest value shown, but for a 200th at either end.
    """
    values = np.asarray(values)
    if values.dtype == np.uint8:
        return values
    is_field = values.shape[1] > 1
    if is_field:
        values = values[..., : 3 if values.shape[-1] > 2 else 1]
    values = np.nan_to_num(values.astype(np.float32))
    low, high = np.quantile(values, (0.005, 0.995))
    x = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    if is_field:
        return (x * 255).round().astype(np.uint8)
    return np.stack([_curves(signal) for signal in x[:, 0]])


def _curves(signal):
    """Draws a signal (w, c) in [0, 1] as curves, uint8 (48, 72, 3)."""
    height, width = CURVES
    picture = Image.new("RGB", (4 * width, 4 * height), "white")
    columns = np.linspace(4, 4 * width - 5, len(signal))
    for channel, colour in zip(signal.T, itertools.cycle(COLOURS), strict=False):
        rows = 4 * height - 5 - channel * (4 * height - 9)
        points = list(zip(columns.tolist(), rows.tolist(), strict=True))
        ImageDraw.Draw(picture).line(points, colour, 5)
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


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
