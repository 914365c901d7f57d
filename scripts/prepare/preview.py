"""A picture of what a dataset holds: records spread over it, decoded, each with its label.

A wrong scale, order of channels or labels that are shifted are seen at once. It lies beside the
records as `preview.png`, which no reader of records looks at.
"""

import json
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.codec import SD_SCALE
from scripts.prepare import moments, shards
from utils import conditions, dataset, files, images, order, processes

COUNT = 64
CELL = 112  # pixels of the long side of an image in the picture
GAP, TEXT, FONT = 6, 15, 12  # pixels between cells, of a line of text, of its letters
DECODED_AT_ONCE = 8
STAND_IN = 3.0  # scaled latents from -3 to 3 become dark to bright


def run(args):
    """Runs `prepare_dataset preview`."""
    draw(args.root, args.output, vae=args.vae, split=args.split, count=args.count)


def after(args):
    """Draws `args.preview` records, with which every preparation ends.

    A picture that is there stays: it is removed with the records that it is of.
    """
    if not (files.path(args.output) / shards.PREVIEW).exists():
        draw(args.output, vae=getattr(args, "vae", "auto"), count=args.preview)


def draw(root, path=None, *, vae="auto", split=None, count=COUNT):
    """Draws records of the dataset at `root`.

    Args:
      path: of the PNG; default: `preview.png` beside the records.
      vae: decodes latents: as in `dataset.vae`; "none": its channels are shown as they are; "auto":
        "mse" where that is in the cache and there is an accelerator, else none.
      split: default: train, or the first that there is.
    """
    root = files.path(root)
    path = files.path(path or root / shards.PREVIEW)
    records = dataset.open_records(root, split or first_split(root))
    records = records.holding(tuple(arrays_of(records)))
    batch = records.read(order.spread(records.num_records, count), flipped=False)
    by_label = np.argsort(batch["label"], kind="stable")
    batch = {key: values[by_label] for key, values in batch.items()}
    pictures, how = to_images(batch, vae)
    beside = [arrays(batch[name], name, vae, pictures.shape[1:]) for name in records.wanted]
    pictures = np.concatenate([*beside, pictures], axis=2)
    how += f"; to the left {', '.join(records.wanted)}" if beside else ""
    shown, total = len(pictures), f"{records.num_records:,} ({records.split})"
    title = f"{shown} of {total}, by label, of {records.num_classes or 'no'} classes; {how}"
    names = class_names(root) if records.num_classes else [""]
    labels = [f"{y} {names[y]}" if names else str(y) for y in batch["label"].tolist()]
    labels = labels if records.num_classes else [""] * shown
    images.save_png(path, sheet(pictures, labels, title))
    print(f"preview: {title} -> {path}", flush=True)


def arrays_of(records):
    """Names the conditions of records that can be drawn: those with the axes of an image."""
    there = {name: shape for name, (shape, _) in records.features.items()}
    return [n for n in there if len(there[n]) == 3 and not n.endswith(conditions.FLIPPED)]


def arrays(values, name, vae, shape):
    """Draws conditions (N, h, w, c) as pictures uint8 (N, *shape)."""
    if name.endswith(f"_{conditions.LATENT}"):  # the mean alone
        values = to_images({"moments": np.concatenate([values, np.zeros_like(values)], -1)}, vae)[0]
    elif values.dtype != np.uint8:
        values = images.to_uint8(images.stretched(values.astype(np.float32)))
    return images.fitted(values, shape)


def first_split(root):
    """Returns `train`, or where there is none the first split of the dataset at `root`."""
    try:
        splits = json.loads((files.path(root) / "dataset_info.json").read_text())["splits"]
        names = [split["name"] for split in splits]
    except (OSError, ValueError, LookupError, TypeError):  # open_records tells what is wrong
        names = []
    return "train" if "train" in names or not names else names[0]


def class_names(root):
    """Reads the names of the classes in the order of the labels; () where they are numbers."""
    try:
        names = (files.path(root) / "label.labels.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        names = []
    return () if names == [str(i) for i in range(len(names))] else names


def to_images(batch, vae_name):
    """Turns records into uint8 (N, h, w, 1 or 3), with a few words on what is shown."""
    if "values" in batch:
        values = batch["values"].astype(np.float32)
        said = f"values {'x'.join(map(str, values.shape[1:]))}"
        return images.shown(values), f"{said}, {values.min():.4g} to {values.max():.4g}"
    if "image" in batch:
        pixels = batch["image"]
        n, h, w, c = pixels.shape
        said = f"pixels {h}x{w}x{c}, {pixels.min()} to {pixels.max()}"
        if c in (1, 3):
            return pixels, said
        return pixels[..., : 3 if c > 3 else 1], f"{said}, the first {3 if c > 3 else 1} shown"
    mean = np.split(batch["moments"].astype(np.float32), 2, axis=-1)[0]
    x = mean * SD_SCALE
    _, h, w, c = x.shape
    said = f"latents {h}x{w}x{c}, deviation {x.std():.2f} after times {SD_SCALE} (about 1 is right)"
    if name := _autoencoder(vae_name, c):
        return _decode(name, x), f"{said}, decoded by {name}"
    if c != moments.SD_CHANNELS:  # of another autoencoder, which has another factor
        spread = mean.std()
        x, said = (
            mean / max(spread, 1e-6),
            f"latents {h}x{w}x{c}, divided by {spread:.3g}, their deviation",
        )
    shown = 3 if c >= 3 else 1
    levels = images.to_uint8((x[..., :shown] / STAND_IN).clip(-1, 1))
    which = f"channels 1-{shown}" if shown > 1 else "channel 1"
    return levels, f"{said}, not decoded: {which} from -{STAND_IN:g} to {STAND_IN:g}"


def _autoencoder(name, channels):
    """Returns the name of the autoencoder that is to decode; None for none."""
    if name != "auto":
        return None if name == "none" else name
    if channels != moments.SD_CHANNELS:
        return None
    import jax

    from models import vae

    try:
        vae.find("mse")
    except FileNotFoundError:
        return None
    return "mse" if jax.default_backend() != "cpu" else None  # minutes on one


def _decode(name, x):
    import jax

    from models import vae

    autoencoder = vae.load(name)
    expected = jax.eval_shape(autoencoder.encode, autoencoder.params, _image_of(autoencoder, x))[0]
    if expected.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"dataset.vae={name} has latents of {expected.shape[-1]} channels, the records have "
            f"{x.shape[-1]}: --vae names another, or none"
        )
    decode = jax.jit(lambda params, part: images.to_uint8(autoencoder.decode(params, part)))
    params = jax.device_put(autoencoder.params)
    size = DECODED_AT_ONCE
    padded = np.concatenate([x, np.zeros((-len(x) % size, *x.shape[1:]), x.dtype)])
    starts = processes.progress(
        range(0, len(padded), size), len(padded) // size, "batches", "decoding"
    )
    parts = [np.asarray(decode(params, padded[start : start + size])) for start in starts]
    return np.concatenate(parts)[: len(x)]


def _image_of(autoencoder, x):
    import jax

    sides = [side * autoencoder.downscale for side in x.shape[1:3]]
    return jax.ShapeDtypeStruct((1, *sides, 3), np.float32)


# The sheet


def sheet(pictures, labels, title):
    """Lays images uint8 (N, h, w, 1 or 3) in a square, labels below: uint8 (H, W, 3)."""
    scaled = [_fit(picture) for picture in pictures]
    width, height = scaled[0].size
    cell = width + GAP
    columns = int(np.ceil(np.sqrt(len(scaled))))
    rows = -(-len(scaled) // columns)
    font = ImageFont.load_default(FONT)
    total = max(columns * cell + GAP, 4 * CELL)
    lines = textwrap.wrap(title, int((total - 2 * GAP) * len(title) / font.getlength(title)))
    top = len(lines) * TEXT + 2 * GAP
    canvas = Image.new("RGB", (total, top + rows * (height + TEXT + GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        pen.text((GAP, GAP + i * TEXT), line, "black", font)
    for i, (picture, label) in enumerate(zip(scaled, labels, strict=True)):
        left, upper = GAP + i % columns * cell, top + i // columns * (height + TEXT + GAP)
        canvas.paste(picture, (left, upper))
        pen.text((left, upper + height + 1), _short(label, font, cell - GAP), "black", font)
    return np.asarray(canvas)


def _fit(picture):
    """Scales one image to about the size of a cell, small ones by whole factors: a PIL image."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).convert("RGB")
    longest = max(image.size)
    if (times := CELL // longest) >= 2:
        return image.resize(tuple(side * times for side in image.size), Image.Resampling.NEAREST)
    size = tuple(max(round(side * CELL / longest), 1) for side in image.size)
    smooth = Image.Resampling.BOX if longest > CELL else Image.Resampling.BICUBIC
    return image.resize(size, smooth)


def _short(text, font, width):
    """Returns the text, or as much of it as fits, with three dots."""
    while font.getlength(text) > width:
        text = f"{text.removesuffix('...')[:-1]}..."
    return text
