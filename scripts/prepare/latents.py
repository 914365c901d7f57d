"""Latents that people have -> records: what a cache of them is, what its arrays hold, the job."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import numpy as np

from models import vae
from models.codec import SD_SCALE
from scripts.prepare import conditions, labels, moments, shards
from utils import dataset, processes

LOOKED_AT = 16  # records that say what the others are
AT_ONCE = 32  # records that a thread reads
LOGARITHMS = 0.9  # of the second half below 0: samples have half, deviations none
NAMES_OF_MOMENTS = ("moments", "mean-std")  # the latter of EDM2's files
# The spread of latents of SD's autoencoder is about 5.5, times 0.18215 it is 1: between them.
SCALED_BELOW = 2.3
WHAT = {
    "moments": "mean and standard deviation", "log_moments": "mean and log variance (converted)",
    "samples": "samples",
}  # fmt: skip


class Item(NamedTuple):
    """One latent (h, w, c) or (c, h, w), that of the mirrored image, and the label beside it."""

    latent: np.ndarray
    flipped: np.ndarray | None = None
    label: Any = None


class Cache(NamedTuple):
    """Latents as they lie.

    title: whose they are, in words.
    rows: {split: [(what `read` takes, label as `labels.read` gives it, or None)]}.
    read: function of an item -> `Item`; called from several threads. where: -> its place.
    content: what their writer is known to write: a key of `WHAT`, "either" of the first two, or
      None.
    scaled: whether their writer multiplies them by 0.18215.
    inside: whether labels are known only with the latents.
    settings: beside what they are taken for: what has to be equal to go on with another's shards.
    name: what they are called in their files.
    foreign: whether nothing is known of their writer but that name.
    fetch: see `conditions.Beside`, where there may be conditions.
    """

    title: str
    rows: dict
    read: Callable
    where: Callable
    settings: dict
    content: str | None = None
    scaled: bool = False
    inside: bool = False
    name: str = ""
    foreign: bool = False
    fetch: Callable | None = None


def bring(args, cache, listing):
    """Returns the job behind all that stores latents; returns whether the records are complete.

    Args:
      args: the options of `write` and of `form`, `splits`, `num_classes` and `labels`.
      listing: what was left out.
    """
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in cache.rows.items())
    print(f"{args.input}: {cache.title}; {counts} latents{listing}", flush=True)
    deferred = cache.inside and args.num_classes
    if cache.inside and not deferred:
        cache = cache._replace(rows=_with_labels(cache, args.workers))
    if deferred:
        classes, items = args.num_classes, cache.rows
    else:
        classes, items = labels.numbered(cache.rows, args, cache.where)
    every = [key for rows in items.values() for key, _ in rows]
    look = [cache.read(key) for key in every[:: -(-len(every) // LOOKED_AT)]]
    form_ = form(args, [item.latent for item in look], cache.where(every[0]), cache)
    flipped = look[0].flipped is not None
    number = classes if isinstance(classes, int) else len(classes)
    views = "both views" if flipped else "one view"
    print(f"{WHAT[form_.content]}, {views}, {number or 'no'} classes", flush=True)

    def read(row):
        key, label = row
        found, where = cache.read(key), cache.where(key)
        if (found.flipped is None) == flipped:
            raise ValueError(f"{where}: {'no' if flipped else 'a'} latent of the mirrored image; "
                             f"others have {'one' if flipped else 'none'}")  # fmt: skip
        if deferred:
            label = labels.whole_number(where, found.label)
        views = {"moments": found.latent, "moments_flipped": found.flipped}
        return (
            where,
            {k: form_(checked(where, v)) for k, v in views.items() if v is not None},
            label,
        )

    names = {
        split: [key if isinstance(key, str) else " ".join(map(str, key)) for key, _ in rows]
        for split, rows in items.items()
    }
    settings = cache.settings | form_.settings()
    if not deferred:
        settings["labels"] = labels.digest(items)
    return write(args, classes, items, names, read, settings, flipped, cache.fetch)


def _with_labels(cache, workers):
    """Reads a cache through for its rows, where labels are known only with the latents."""
    rows = {}
    for split, of_split in cache.rows.items():
        keys = [key for key, _ in of_split]

        def read(key):
            return key, labels.read(cache.where(key), cache.read(key).label)

        pairs = _in_threads(read, keys, workers)
        rows[split] = list(processes.progress(pairs, len(keys), "labels", f"labels ({split})"))
    return rows


def write(args, classes, items, names, read, settings, flipped=False, fetch=None):
    """Writes latents as records.

    Args:
      args: `output`, `store`, `records_per_shard`, `workers` and what `shards.write` asks for.
      classes: their names, or their number.
      items: {split: [one for each record]}; names: {split: [str]}, what identifies them.
      read: function of an item -> (where, for people; {"moments": (h, w, 2c) float32, mean, then
        standard deviation, unscaled, and where `flipped` "moments_flipped"}; label or None). Called
        from several threads.
      settings: what has to be equal for a run to go on with the shards of another.
      fetch: see `conditions.Beside`, where there may be conditions.

    Returns whether the records are complete.
    """
    if args.vae not in ("auto", "none"):
        vae.find(args.vae)  # its lack is told before the work; the preview needs it
    shape, dtype = read(next(iter(items.values()))[0])[1]["moments"].shape, np.dtype(args.store)
    count = classes if isinstance(classes, int) else len(classes)
    spread = moments.Spread()
    stream = functools.partial(examples, read, shape, dtype, count, args.workers, spread)
    settings, more = settings | {"store": args.store}, {}
    if fetch:
        stream, more = conditions.beside(args, stream, fetch, items, None, shape)
    complete = shards.make(
        args, stream, key="moments", shape=shape, dtype=dtype, classes=classes, flipped=flipped,
        items=items, names=names, settings=settings | more.pop("settings", {}), **more
    )  # fmt: skip
    spread.report(f"; --scaled_by={SD_SCALE} divides" if hasattr(args, "scaled_by") else "")
    return complete


def examples(read, shape, dtype, num_classes, workers, spread, items):
    """Yields examples of items, in order; anything odd is an error that names the record."""

    def example(item):
        where, views, label = read(item)
        for found in views.values():
            if found.shape != shape:
                raise ValueError(f"{where}: latent {found.shape}, the others have {shape}")
        if label is not None and not 0 <= label < num_classes:
            raise ValueError(f"{where}: label {label}; --num_classes is {num_classes}")
        stored = {key: moments.check(where, found, dtype) for key, found in views.items()}
        return dataset.example(label, **stored)

    for found in _in_threads(example, items, workers):
        spread.add(found["moments"])
        yield found


def _in_threads(function, items, workers):
    """Yields function(item) of each, in order; some at a time, as each is little for a thread."""
    if items:
        parts = [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]
        source = grain.MapDataset.source(parts).map(lambda part: [function(item) for item in part])
        for results in source.to_iter_dataset(grain.ReadOptions(workers, 2 * workers)):
            yield from results


# What arrays hold


class Form(NamedTuple):
    """How an array of one record is to be read.

    channels_first: whether it is (c, h, w), else (h, w, c).
    content: a key of `WHAT`.
    scaled_by: what its numbers were multiplied by.
    """

    channels_first: bool
    content: str
    scaled_by: float

    def __call__(self, array):
        """Turns one record into moments (h, w, 2c) float32; a sample into a mean of deviation 0."""
        array = _channels_last(array, self.channels_first)
        h, w, c = array.shape
        found = (np.zeros if self.content == "samples" else np.empty)(
            (h, w, 2 * c if self.content == "samples" else c), np.float32
        )
        found[..., :c] = array
        if self.content == "log_moments":  # as diffusers' DiagonalGaussianDistribution
            logs = found[..., c // 2 :]
            np.exp(0.5 * np.clip(logs, -30, 20), out=logs)
        if self.scaled_by != 1:
            found /= np.float32(self.scaled_by)
        return found

    def settings(self):
        """Returns what of it has to be equal for a run to go on with the shards of another."""
        logs = ["log"] if self.content == "log_moments" else []
        return {"arrays": [self.channels_first, self.content == "samples", self.scaled_by, *logs]}


def form(args, arrays, where, cache):
    """Returns the `Form` of records like `arrays`, each (h, w, c) or (c, h, w), said in a line.

    Args:
      args: `layout` nhwc, nchw or auto, `content` of `WHAT` or auto, `scaled_by` or None for auto.
      where: where they are from.
      cache: the `Cache`, for what its writer is known to write.

    Raises:
      ValueError: no latents, or what they are cannot be seen, and was not said.
    """
    arrays = [checked(where, array) for array in arrays]
    shape = arrays[0].shape
    arrays = [array for array in arrays if array.shape == shape]  # others are told when read
    a, b, c = shape
    channels_first = b == c if args.layout == "auto" else args.layout == "nchw"
    if args.layout == "auto" and (a == b) == (b == c):
        # So are the arrays of all writers that are known.
        channels_first = cache.content is not None and not cache.foreign
        if not channels_first:
            raise ValueError(
                f"{where}: which axis of {shape} has the channels? --layout=nchw or nhwc"
            )
    arrays = [_channels_last(array, channels_first) for array in arrays]
    content = args.content
    if content == "auto":
        content = _content(arrays, where, cache)
    channels = arrays[0].shape[-1]
    if content != "samples" and channels % 2:
        raise ValueError(f"{where}: {channels} channels are not a mean and a deviation for each")
    channels = channels if content == "samples" else channels // 2
    scaled_by = args.scaled_by
    if scaled_by is None:
        scaled_by = _scale([a[..., :channels] for a in arrays], where, cache)
    times = f" times {scaled_by:g} (--scaled_by)" if scaled_by != 1 else ""
    print(
        f"records {shape}, taken as {WHAT[content]} of {channels} channels{times} (--content="
        f"{content}), --layout={'nchw' if channels_first else 'nhwc'}", flush=True
    )  # fmt: skip
    return Form(channels_first, content, scaled_by)


def _content(arrays, where, cache):
    """Tells what records (h, w, c) hold, by what their writer writes and by the second half of the
    channels: deviations have no negative number there, logarithms nearly all, samples half."""
    half = arrays[0].shape[-1] // 2
    negative = np.mean([np.mean(array[..., half:] < 0) for array in arrays])
    content = "samples"
    if not arrays[0].shape[-1] % 2 and (negative == 0 or negative > LOGARITHMS):
        content = "log_moments" if negative else "moments"
    known = cache.content
    if known is None:
        if content == "log_moments":
            raise ValueError(
                f"{where}: the second half of the channels is negative; are they logarithms of "
                "variances? --content=log_moments makes them deviations; --content=samples, if "
                "they are samples"
            )
        return "moments" if any(word in cache.name for word in NAMES_OF_MOMENTS) else content
    if content == known or (known == "either" and content != "samples"):
        return content
    expected = WHAT.get(known, "mean and deviation or log variance")
    raise ValueError(
        f"{where}: {cache.title} is known for {expected}, and of the second half of the channels "
        f"{negative:.0%} are negative; --content={', '.join(WHAT)} says what it holds"
    )


def _scale(values, where, cache):
    """Finds the factor in latents, each (h, w, c); of other autoencoders than SD's 1."""
    spread = float(np.concatenate([np.ravel(a) for a in values]).astype(np.float64).std())
    if values[0].shape[-1] != moments.SD_CHANNELS or (spread < SCALED_BELOW) == cache.scaled:
        return SD_SCALE if cache.scaled else 1.0
    raise ValueError(
        f"{where}: the latents have a standard deviation of {spread:.2f}; unscaled ones of SD's "
        f"autoencoder have about 5.5, those times {SD_SCALE} about 1, which is expected of "
        f"{cache.title if cache.scaled else 'none'} here: --scaled_by={SD_SCALE} divides by it, "
        "--scaled_by=1 takes them as they are"
    )


def _channels_last(array, channels_first):
    return np.moveaxis(array, 0, -1) if channels_first else array


def checked(where, array):
    """Returns the array of one latent, (h, w, c) or (c, h, w); one axis of length 1 before may go.

    Raises:
      ValueError: it is no latent, in a line that begins with `where`.
    """
    array = np.asarray(array)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{where}: shape {array.shape}; a latent is (h, w, c) or (c, h, w)")
    if not (array.dtype.kind == "f" or array.dtype.name == "bfloat16"):
        raise ValueError(f"{where}: {array.dtype}, not the floats of latents")
    return array
