"""Conditions that records hold beside the sample and the label: what each is, and those of images.

The rank says what one is: a number or vector (D,), tokens (N, D), an array (h, w, c) of the
sample's size. Beside `NAME` a record may hold `NAME_mask` (N,), which tokens are true. An image
beside latents is one too: `NAME_latent` (h, w, c), the mean of the autoencoder's posterior,
unscaled, and for flips `NAME_latent_flipped`, that of the mirrored image.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from utils import dataset, files, identity, npy, order

KINDS = ("vector", "vector", "tokens", "array")  # by rank
CHUNK = 500  # records that are read at a time
LATENT, MASK, FLIPPED = "latent", "_mask", "_flipped"
# What objectives, networks and records call their own.
TAKEN = "t r h y omega t_min t_max augment null label labels image moments values".split()


class Condition(NamedTuple):
    """What a condition is.

    shape: of one row. dtype: as it is stored, or LATENT. kept: it stays where the label is dropped.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kept: bool = False

    @property
    def kind(self):
        """Says `vector`, `tokens` or `array`."""
        return KINDS[len(self.shape)]

    @property
    def latent(self):
        """Says whether it is the mean of an autoencoder's posterior."""
        return self.dtype == LATENT

    @property
    def feature(self):
        """Names the tensor of the records."""
        return f"{self.name}_{LATENT}" if self.latent else self.name

    def __str__(self):
        """Writes dtype and shape: uint8:8x8x1."""
        return f"{self.dtype}:{'x'.join(map(str, self.shape))}"


def of_options(data, size):
    """Makes the conditions of the options `dataset`, a tuple of `Condition`.

    `size`: (h, w) of the sample.

    Raises:
      ValueError: options that do not fit together.
    """
    names, texts = data.conditions, data.condition_shapes
    if len(texts) != len(names):
        raise ValueError(
            f"dataset.condition_shapes: {len(texts)} for {len(names)} of dataset.conditions; leave "
            "it empty: then it is as the records say"
        )
    for name in names:
        if name in TAKEN or not name.isidentifier() or names.count(name) > 1:
            raise ValueError(
                f"dataset.conditions: {name!r} is there twice, no plain name, or a name of the "
                f"program's own ({', '.join(TAKEN)})"
            )
    for name in data.kept_conditions:
        if name not in names:
            raise ValueError(f"dataset.kept_conditions: {name} is none of dataset.conditions")
    found = []
    for name, text in zip(names, texts, strict=True):
        if not re.fullmatch(r"\w+:(\d+(x\d+)*)?", text):
            raise ValueError(f"dataset.condition_shapes: {text!r} is not as uint8:8x8x1")
        dtype, _, sizes = text.partition(":")
        shape = tuple(int(size) for size in sizes.split("x") if size)
        found.append(Condition(name, shape, dtype, name in data.kept_conditions))
        if len(shape) > 3 or (len(shape) == 3 and shape[:2] != tuple(size)):
            raise ValueError(
                f"dataset.conditions: {name} is {text}; there are vectors (D,), tokens (N, D) and "
                f"arrays of the sample's size {size[0]}x{size[1]}"
            )
    return tuple(found)


def shapes_of(records, names):
    """Returns what records say of the conditions `names`, as `dataset.condition_shapes` has it."""
    found = []
    for name in names:
        feature = next((f for f in (name, f"{name}_{LATENT}") if f in records.features), None)
        if feature is None:
            there = ", ".join(sorted(records.features)) or "none"
            raise ValueError(
                f"dataset.conditions: {records.root} holds no {name}; beside sample and label it "
                f"holds {there}"
            )
        shape, dtype = records.features[feature]
        found.append(str(Condition(name, shape, str(dtype) if feature == name else LATENT)))
    return tuple(found)


def choose(records, given, flipped):
    """Returns the records so that they are read with their conditions.

    Args:
      records: `dataset.Records`.
      given: of `of_options`.
      flipped: whether images are mirrored: then latents of the mirrored images are read too.

    Raises:
      ValueError: conditions that are not there, of another shape, or that cannot be mirrored.
    """
    for one, text in zip(given, shapes_of(records, [one.name for one in given]), strict=True):
        if text != str(one):
            raise ValueError(
                f"dataset.root {records.root} holds {one.name} as {text}, the config asks for "
                f"{one}; see dataset.condition_shapes"
            )
        if flipped and one.latent and one.feature + FLIPPED not in records.features:
            raise ValueError(
                f"dataset.use_flip: {records.root} holds no {one.feature}{FLIPPED}, and a latent "
                "cannot be mirrored; prepare it with --flip=True, or switch dataset.use_flip off"
            )
        mask = records.features.get(f"{one.name}{MASK}")
        if one.kind == "tokens" and mask and tuple(mask[0]) != one.shape[:1]:
            raise ValueError(
                f"dataset.root {records.root} holds {one.name}{MASK} {mask[0]} beside "
                f"{one.name} {one}: a mask has a number for each token; prepare it again"
            )
    wanted = [one.feature for one in given]
    wanted += [f"{one.name}{MASK}" for one in given if f"{one.name}{MASK}" in records.features]
    wanted += [one.feature + FLIPPED for one in given if flipped and one.latent]
    return records.holding(tuple(wanted))


def blank(given):
    """Makes a row of each condition, as networks take them, to make parameters with."""
    rows = {one.name: np.zeros((1, *one.shape), np.float32) for one in given}
    null = {one.name: np.zeros(1, bool) for one in given if not one.kept}
    return rows | ({"null": null} if null else {})


# Of images that are drawn -------------------------------------------------------------------------


class Source(NamedTuple):
    """Raw conditions of images by their number.

    records: where they are from, whose samples are the truth and whose labels go along; or None.
    arrays: {feature: (M, ...)} in their place.
    places: int (M,), which record image i has: places[i % M].
    """

    records: dataset.Records | None
    arrays: dict[str, np.ndarray]
    places: np.ndarray

    def __call__(self, index):
        """Returns the raw batch of images number `index` (n,), as `Records.read` gives it."""
        places = self.places[np.asarray(index) % len(self.places)]
        if self.records is None:
            return {name: array[places] for name, array in self.arrays.items()}
        return self.records.read(places, flipped=False)

    @property
    def identity(self):
        """Makes a digest of what the conditions are."""
        if self.records is None:
            return identity.of_arrays(self.arrays)
        return identity.of_arrays({}, self.records.split, self.records.identity)

    @property
    def labelled(self):
        """Says whether it tells the label of an image too."""
        return self.records is not None or "label" in self.arrays

    def labels(self, count):
        """Returns the labels of the first `count` images, int32 (count,); None: it has none."""
        if not self.labelled:
            return None
        starts = range(0, count, CHUNK)
        return np.concatenate([self(np.arange(i, min(i + CHUNK, count)))["label"] for i in starts])


def source(given, data, sampling):
    """Opens the `Source` of the options `dataset` and `sampling`; None where nothing is given.

    Image i has the i-th record of an order by chance that `sampling.seed` says; of a file row i.

    Raises:
      ValueError, FileNotFoundError: not there, or of other shapes than the network takes.
    """
    if not given:
        return None
    if sampling.conditions:
        arrays = of_file(sampling.conditions, given)
        return Source(None, arrays, np.arange(len(next(iter(arrays.values())))))
    root = data.condition_root or data.root
    try:
        records = dataset.open_records(root, data.condition_split, data.stage)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{error}; images are drawn by the conditions of records (dataset.condition_root, or "
            "root, and condition_split), or of a file (sampling.conditions)"
        ) from error
    records = choose(records, given, False)
    count = records.num_records
    places = order.shuffled_indices(0, count, count, sampling.seed, count > order.LARGE)
    return Source(records, {}, places)


def batch_of(given, rows, count):
    """Makes a raw batch of arrays that somebody gives: (names of those that are not, batch).

    Args:
      given: of `of_options`.
      rows: {name: (count, ...), or one row for all}; masks of tokens as NAME_mask.

    Raises:
      ValueError: one that is unknown, is needed, or of another shape.
    """
    if not isinstance(rows, Mapping):
        raise ValueError(f"conditions: {{name: array}} is needed, not {type(rows).__name__}")
    known = {one.name: one.shape for one in given}
    known |= {f"{one.name}{MASK}": one.shape[:1] for one in given if one.kind == "tokens"}
    if unknown := sorted(rows.keys() - known.keys()):
        names = ", ".join(known) or "none"
        raise ValueError(f"conditions: {unknown[0]} is none of those of the network: {names}")
    from jax import numpy as jnp  # late: readers of a folder need none

    missing, batch = [one.name for one in given if one.name not in rows], {}
    of_feature = {one.feature: one for one in given}  # others are masks
    for one in given:
        if one.kept and one.name in missing:
            raise ValueError(
                f"conditions: {one.name} ({one}) is needed, the network is never without"
            )
        batch[one.feature] = rows.get(one.name, np.zeros(one.shape, np.float32))
        if (mask := f"{one.name}{MASK}") in rows:
            batch[mask] = rows[mask]
    shapes = [known[name.removesuffix(f"_{LATENT}")] for name in batch]
    for (name, array), shape in zip(batch.items(), shapes, strict=True):
        if np.shape(array) not in (shape, (count, *shape)):
            raise ValueError(f"conditions: {name} {np.shape(array)} instead of {(count, *shape)}")
        traced = hasattr(array, "aval")  # or an array of jax
        if not traced:
            _check_numbers(name, np.asarray(array), of_feature.get(name), shape)
        batch[name] = (jnp if traced else np).broadcast_to(array, (count, *shape))
    return missing, batch


def _check_numbers(name, array, one, shape):
    """Refuses an array of a `Condition` that is not of finite numbers; `one` None: of a mask."""
    if array.dtype.kind in "USO":
        raise ValueError(f"conditions: {name} is of {array.dtype}, not of numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"conditions: {name} is not finite")
    if one:
        check_bytes(f"conditions: {name}", array, one)
    else:
        check_mask("conditions", name, array, shape)


def of_file(path, given):
    """Reads {feature: (M, ...)} of a .npz, or of a folder of NAME.npy; with `label`, where there.

    Raises:
      ValueError: one is missing, or of another shape; in a line that names the file.
    """
    path = files.local(path)
    with files.reading(path, "not a .npz, and no folder of .npy"):
        if path.is_dir():
            arrays = {file.stem: npy.mapped(file) for file in sorted(path.glob("*.npy"))}
        else:
            arrays = dict(npy.load_npz(path))
    found = {}
    for one in given:
        array = arrays.get(one.name, arrays.get(one.feature))
        if array is None:
            raise ValueError(f"{path} holds no {one.name}, only {', '.join(arrays) or 'nothing'}")
        found[one.feature] = checked(f"{path}: {one.name}", array, one)
        if (mask := arrays.get(f"{one.name}{MASK}")) is not None:
            found[f"{one.name}{MASK}"] = mask
            if one.kind == "tokens":
                check_mask(path, f"{one.name}{MASK}", mask, one.shape[:1])
    labels = arrays.get("label", arrays.get("labels"))
    found |= {} if labels is None else {"label": labels.astype(np.int32)}
    counts = {name: len(array) for name, array in found.items()}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ValueError(f"{path}: not a row for each image: {told}")
    return found


def check_mask(where, name, mask, shape):
    """Refuses a mask (..., N) of tokens that does not end in `shape`, or has more than 0 and 1."""
    if mask.shape[-1:] != tuple(shape) or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"{where}: {name} is {mask.dtype} {mask.shape}; a mask has true or false (1 or 0) for "
            f"each of {shape[0]} tokens"
        )


def checked(where, array, one):
    """Returns an array (M, *shape) of a `Condition`; raises ValueError where it cannot be that."""
    array = np.asarray(array)
    if array.shape[1:] != one.shape or array.dtype.kind not in "biuf":
        expected = "x".join(map(str, ("N", *one.shape)))
        raise ValueError(f"{where}: {array.dtype} {array.shape} instead of numbers {expected}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise ValueError(f"{where}: row {row} is not finite")
    check_bytes(where, array, one)
    return array


def check_bytes(where, array, one):
    """Refuses numbers beyond [-1, 1] that are no bytes, of a `Condition` that is an image of bytes.

    Up to 2 is let through, as what resampling may overshoot.
    """
    of_bytes = one.kind == "array" and one.dtype == "uint8"
    if of_bytes and array.dtype != np.uint8 and array.size and np.abs(array).max() > 2:
        raise ValueError(
            f"{where}: {array.dtype} up to {array.max():g}; an image is uint8 from 0 to 255, or "
            "other numbers from -1 to 1"
        )
