"""Latents that people have -> records: what an array holds, and the job that writes them."""

import functools
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from models import vae
from models.codec import SD_SCALE
from scripts.prepare import moments, shards

LOOKED_AT = 16  # records that say what the others are
LOGARITHMS = 0.9  # of the second half below 0: samples have half, deviations none
NAMES_OF_MOMENTS = ("moments", "mean-std")  # the latter of EDM2's files


def write(args, classes, items, names, read, settings):
    """Writes latents as records.

    Args:
      args: `output`, `store`, `records_per_shard`, `workers` and what `shards.write` asks for.
      classes: their names, or their number.
      items: {split: [one for each record]}; names: {split: [str]}, what identifies them.
      read: function of an item -> (where, for people; moments (h, w, 2c) float32, mean, then
        standard deviation, unscaled; label). Called from several threads.
      settings: what has to be equal for a run to go on with the shards of another.

    Returns whether the records are complete.
    """
    if args.vae not in ("auto", "none"):
        vae.find(args.vae)  # its lack is told before the work; the preview needs it
    shape, dtype = read(next(iter(items.values()))[0])[1].shape, np.dtype(args.store)
    count = classes if isinstance(classes, int) else len(classes)
    spread = moments.Spread()
    stream = functools.partial(examples, read, shape, dtype, count, args.workers, spread)
    job = shards.Job(
        output=Path(args.output),
        key="moments",
        shape=shape,
        dtype=dtype,
        classes=classes,
        flipped=False,
        items=items,
        names=names,
        records_per_shard=args.records_per_shard,
        settings=settings | {"store": args.store},
    )
    complete = shards.write(job, stream, args.process_id, args.num_processes, args.overwrite)
    spread.report(f"; --scaled_by={SD_SCALE} divides" if hasattr(args, "scaled_by") else "")
    return complete


def examples(read, shape, dtype, num_classes, workers, spread, items):
    """Items -> examples, in order; anything odd is an error that names the record."""

    def example(item):
        where, found, label = read(item)
        if found.shape != shape:
            raise ValueError(f"{where}: latent {found.shape}, the others have {shape}")
        if not 0 <= label < num_classes:
            raise ValueError(f"{where}: label {label}; --num_classes is {num_classes}")
        return {"moments": moments.check(where, found, dtype), "label": label}

    if items:
        source = grain.MapDataset.source(items).map(example)
        for found in source.to_iter_dataset(grain.ReadOptions(workers, 8 * workers)):
            spread.add(found["moments"])
            yield found


# What arrays hold


class Form(NamedTuple):
    """How an array of one record is to be read.

    channels_first: whether it is (c, h, w), else (h, w, c).
    samples: whether it is a sample of the posterior, else mean, then standard deviation.
    scaled_by: what its numbers were multiplied by.
    """

    channels_first: bool
    samples: bool
    scaled_by: float

    def __call__(self, array):
        """One record -> moments (h, w, 2c) float32. A sample becomes a mean of deviation 0."""
        array = _channels_last(array, self.channels_first).astype(np.float32)
        array = array / np.float32(self.scaled_by)
        return np.concatenate([array, np.zeros_like(array)], axis=-1) if self.samples else array

    def settings(self):
        """What of it has to be equal for a run to go on with the shards of another."""
        return {"arrays": list(self)}


def form(args, arrays, where, name=""):
    """The `Form` of records like `arrays`, each (h, w, c) or (c, h, w), said in a line.

    Args:
      args: `layout` nhwc, nchw or auto, `content` moments, samples or auto, and `scaled_by`.
      where: where they are from; name: what they are called there.

    Raises:
      ValueError: no latents, or what they are cannot be seen, and was not said.
    """
    shape = arrays[0].shape
    a, b, c = shape
    if args.layout == "auto" and (a == b) == (b == c):
        raise ValueError(f"{where}: which axis of {shape} has the channels? --layout=nchw or nhwc")
    channels_first = b == c if args.layout == "auto" else args.layout == "nchw"
    arrays = [_channels_last(array, channels_first) for array in arrays]
    channels = arrays[0].shape[-1]
    samples = args.content == "samples"
    if args.content == "auto":
        samples = _are_samples(arrays, where, name)
    if not samples and channels % 2:
        raise ValueError(f"{where}: {channels} channels are not a mean and a deviation for each")
    what = (
        f"samples of {channels} channels (--content=samples)" if samples
        else f"mean, then deviation, of {channels // 2} channels (--content=moments)"
    )  # fmt: skip
    layout = "nchw" if channels_first else "nhwc"
    print(f"records {shape}, taken as {what}, --layout={layout}", flush=True)
    return Form(channels_first, samples, args.scaled_by)


def _are_samples(arrays, where, name):
    """Whether records (h, w, c) look like samples, not like moments, whose second half is positive
    and whose names say so."""
    half = arrays[0].shape[-1] // 2
    negative = np.mean([np.mean(array[..., half:] < 0) for array in arrays])
    if half and negative > LOGARITHMS:
        raise ValueError(
            f"{where}: the second half of the channels is negative; are they logarithms of "
            "variances? exp(x / 2) makes them deviations; --content=samples, if they are samples"
        )
    if any(word in name for word in NAMES_OF_MOMENTS):
        return False
    return bool(arrays[0].shape[-1] % 2 or negative > 0)


def _channels_last(array, channels_first):
    return np.moveaxis(array, 0, -1) if channels_first else array


def checked(where, array):
    """The array of one latent, (h, w, c) or (c, h, w); one axis of length 1 before may go.

    Raises:
      ValueError: it is no latent, in a line that begins with `where`.
    """
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{where}: shape {array.shape}; a latent is (h, w, c) or (c, h, w)")
    if array.dtype.kind != "f":
        raise ValueError(f"{where}: {array.dtype}, not the floats of latents")
    return array
