"""Conditions beside the samples: from folders, columns, members or arrays into the same records.

`--conditions low=PATH,text=PATH` names them; what stands behind the name is the command's own: a
folder (or .zip) of files with the names of the images, a column, an ending, an array. A picture is
cut and scaled like the image, and encoded where the images are; numbers are stored as they are.
"""

import functools
import io
import json
from pathlib import PurePosixPath

import numpy as np

from scripts.prepare import trees
from utils import conditions, files, images, npy, pictures

ENDINGS = (*pictures.EXTENSIONS, ".npy", ".json")
SMALLER = {"float64": np.float32, "int64": np.int32, "uint64": np.int32}


def in_folders(places, listing):
    """Makes the function (name of an image, place) -> (where, value) of folders or .zip files.

    The files are called like the images, but for their ending.

    Args:
      places: those that `--conditions` names.
      listing: counts what is left out.
    """
    found = {place: trees.open_tree(files.local(place), listing, ENDINGS) for place in places}
    stems = {
        place: {str(PurePosixPath(name).with_suffix("")): name for name in tree.names}
        for place, tree in found.items()
    }

    def fetch(name, place):
        stem = str(PurePosixPath(name).with_suffix(""))
        if (file := stems[place].get(stem)) is None:
            raise ValueError(f"{place} holds no file {stem} beside the image {name}")
        where = found[place].where(file)
        content = found[place].read(file)
        if file.endswith(".json"):
            with files.reading(where, "not JSON"):
                return where, json.loads(content)
        return where, content

    return fetch


def read(where, value, size):
    """Makes the array of a condition.

    Args:
      where: its place, for people.
      value: bytes of a picture or of a .npy, or numbers: an array, a list, one.
      size: side to which a picture is cut and scaled.

    Raises:
      ValueError: it is none of these, or not finite.
    """
    if isinstance(value, dict):  # as Hugging Face has pictures
        value = value.get("bytes")
    if isinstance(value, bytes) and not value.startswith(npy.MAGIC):
        picture = pictures.read(where, file=io.BytesIO(value))
        if size is None:
            raise ValueError(f"{where}: a picture beside latents that are there; give its latent")
        array = np.asarray(images.center_crop(picture, size))
        return array if array.ndim == 3 else array[..., None]
    with files.reading(where, "no picture and no numbers"):
        array = npy.parse(value) if isinstance(value, bytes) else np.asarray(value)
        array = array.astype(SMALLER.get(str(array.dtype), array.dtype), copy=False)
    if array.dtype.kind not in "biuf" or array.ndim > 3:
        raise ValueError(f"{where}: {array.dtype} {array.shape}, no vector, tokens or array")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{where}: not finite")
    return np.ascontiguousarray(array)


def beside(args, make, fetch, items, size, shape, encoder=None):
    """Joins to the examples of a preparation what `args.conditions` asks for.

    Args:
      make: function items -> examples.
      fetch, size, shape, encoder: see `Beside`.
      items: {split: [(key, label)]}.

    Returns:
      `make` with conditions, and the fields `settings` and `conditions` of a `shards.Job`, or {}.
    """
    if not getattr(args, "conditions", None):  # `latents` has no such option
        return make, {}
    first = next(iter(items.values()))[0][0]
    joined = Beside(args.conditions, fetch, first, size, shape[:2], encoder, args.workers)
    told = ", ".join(f"{k} {dtype} {shape}" for k, (shape, dtype) in joined.tensors.items())
    print(f"conditions: {told}", flush=True)
    return joined(make), {"settings": joined.settings(), "conditions": joined.tensors}


class Beside:
    """Conditions of the items of a preparation.

    Args:
      asked: {name: place}, of `--conditions`.
      fetch: function (key of an item, place) -> (where, value), called from several threads.
      first: the key of an item; its conditions say what those of all others are.
      size: of pictures; None: there are none. shape: (h, w) of the samples.
      encoder: makes an `encoder.Encoder`, for pictures; None: they are stored as they are.
      workers: threads.

    Attributes:
      tensors: {feature: (shape, dtype)}, as `dataset.write_metadata` takes it.
    """

    def __init__(self, asked, fetch, first, size, shape, encoder=None, workers=1):
        self._asked, self._fetch, self._size, self._workers = asked, fetch, size, workers
        self._first, self.tensors, self._encoders = {}, {}, {}
        for name, place in asked.items():
            if name in conditions.TAKEN:
                raise ValueError(
                    f"--conditions: {name} is a name of the program's own, take another"
                )
            where, value = fetch(first, place)
            array = self._first[name] = read(where, value, size)
            if array.ndim == 3 and encoder and array.dtype == np.uint8:
                self._encoders[name] = encode = encoder()
                views = ("", conditions.FLIPPED) if encode.flips else ("",)
                latent = (*encode.shape[:2], encode.shape[2] // 2)
                for view in views:
                    feature = f"{name}_{conditions.LATENT}{view}"
                    self.tensors[feature] = (latent, encode.dtype)
                continue
            if array.ndim == 3 and array.shape[:2] != tuple(shape):
                raise ValueError(
                    f"{where}: {array.shape}, and an array has the size of the samples, {shape}"
                )
            self.tensors[name] = (array.shape, array.dtype)

    def settings(self):
        """Returns what has to be equal for a run to go on with the shards of another."""
        tensors = {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.tensors.items()}
        return {"conditions": {**self._asked}, "tensors of conditions": tensors}

    def __call__(self, make):
        """Makes the function items -> examples with their conditions, of one without them."""

        def examples(items):
            streams = [iter(make(items)), *(self._stream(name, items) for name in self._asked)]
            for example, *more in zip(*streams, strict=True):
                yield None if example is None else functools.reduce(dict.__or__, more, example)

        return examples

    def _stream(self, name, items):
        """Yields {feature: array} of a condition for each item."""
        import grain  # late: records without conditions do not wait for it

        source = grain.MapDataset.source(list(items)).map(lambda item: self._one(name, item[0]))
        rows = source.to_iter_dataset(grain.ReadOptions(self._workers, 8 * self._workers))
        if name not in self._encoders:
            return ({name: array} for array in rows)
        colours = ((np.broadcast_to(array, (*array.shape[:2], 3)), None) for array in rows)
        encoded = self._encoders[name](colours)
        return (
            {
                key.replace("moments", f"{name}_{conditions.LATENT}"): np.split(value, 2, axis=-1)[
                    0
                ]
                for key, value in example.items()
            }
            for example in encoded
        )

    def _one(self, name, key):
        """Reads one, which is like that of the first item."""
        where, value = self._fetch(key, self._asked[name])
        array, first = read(where, value, self._size), self._first[name]
        if array.ndim == first.ndim == 3 and (array.shape[2], first.shape[2]) == (1, 3):
            array = array.repeat(3, axis=2)  # a gray picture among others
        if (array.shape, array.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{where}: {name} is {array.dtype} {array.shape}, that of the first record "
                f"{first.dtype} {first.shape}; tokens are filled up to one length, and "
                f"{name}{conditions.MASK} says which are true"
            )
        return array
