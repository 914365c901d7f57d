"""Folders of images -> records of latents or pixels."""

import collections
import functools
import itertools
import os
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from metrics import inception_weights
from models import vae
from scripts.prepare import moments, shards, statistics
from utils import environment, images, sharding

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


def run(args):
    """The job behind `prepare_dataset images`: records, statistics, or both."""
    environment.pin()
    classes, items = list_images(Path(args.input), args.splits)
    counts = ", ".join(f"{len(files)} {split}" for split, files in items.items())
    print(f"{args.input}: {len(classes)} classes; {counts} images", flush=True)
    bad = BadImages(args.on_bad_image)
    decode = functools.partial(
        decoded, root=Path(args.input), size=args.image_size, workers=args.workers, bad=bad
    )
    split = next(iter(items))  # whose statistics are made
    if args.compute_fid:
        inception_weights.find(args.inception_weights)  # its lack is told before hours of encoding
        statistics.check(args, split, items[split])
    if args.compute_latent:
        write_records(args, classes, items, decode)
    if args.compute_fid:
        statistics.write(args, split, items[split], decode)
    bad.report()


# The files


def list_images(root, splits=()):
    """Image files below `root/SPLIT/CLASS/`, or `root/CLASS/` where there is no `root/train`.

    Returns (class names sorted, {split: [(path below root, label)] sorted}); the label is the
    index of the class folder among the sorted ones of the first split.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of images at {root}")
    if not splits:
        splits = [split for split in ("train", "val") if (root / split).is_dir()]
    folders = {split: root / split for split in splits} or {"train": root}
    classes, items = None, {}
    for split, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} for the split '{split}'")
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not found:
            raise ValueError(
                f"{folder} has no class folders; images belong into {folder}/CLASS/, and --splits "
                "says which splits to take"
            )
        classes = classes or found
        labels = {name: label for label, name in enumerate(classes)}
        if unknown := [name for name in found if name not in labels]:
            raise ValueError(f"{folder / unknown[0]}: no such class in the first split")
        prefix = folder.relative_to(root)
        items[split] = [
            (str(prefix / name / file), labels[name])
            for name in found
            for file in sorted(os.listdir(folder / name))
            if file.lower().endswith(EXTENSIONS)
        ]
        if not items[split]:
            raise ValueError(f"no images below {folder}; known are {' '.join(EXTENSIONS)}")
    return classes, items


class BadImages:
    """What to do about unreadable images: "fail" at the first, or "skip" and count."""

    def __init__(self, policy):
        self.policy, self.problems = policy, set()

    def add(self, problem):
        if self.policy == "fail":
            raise ValueError(f"{problem}; --on_bad_image=skip leaves such images out")
        if problem not in self.problems:  # the statistics read them a second time
            print(f"left out: {problem}", flush=True)
        self.problems.add(problem)

    def report(self):
        if self.problems:
            print(f"{len(self.problems)} unreadable images were left out", flush=True)


def decoded(items, root, size, workers, bad):
    """(path, label) -> (uint8 (size, size, 3) or None where unreadable, label), in order.

    Decodes and crops in `workers` threads (PIL lets go of the interpreter), not far ahead.
    """
    if not items:
        return
    files = grain.MapDataset.source(items).map(lambda item: _decode(root / item[0], size, item[1]))
    for image, label, problem in files.to_iter_dataset(grain.ReadOptions(workers, 8 * workers)):
        if problem:
            bad.add(problem)
        yield image, label


def _decode(path, size, label):
    try:
        with Image.open(path) as file:  # by content: ImageNet has a PNG named JPEG
            image = file.convert("RGB")  # and CMYK and grayscale files
        return np.asarray(images.center_crop(image, size)), label, None
    except Exception as error:  # PIL raises nearly anything on damaged files
        return None, label, f"cannot read the image {path} ({error or type(error).__name__})"


# Records


def write_records(args, classes, items, decode):
    """Writes latents, or with `--vae=none` pixels, as records."""
    settings = {"image_size": args.image_size, "vae": args.vae}
    if args.vae == "none":
        key, shape, dtype, flipped = "image", (args.image_size, args.image_size, 3), np.uint8, False
        make = functools.partial(_pixels, decode)
    else:
        encode = Encoder(args.vae, args.image_size, args.device_batch_size, args.flip, args.store)
        key, shape, dtype, flipped = "moments", encode.shape, encode.dtype, args.flip
        settings |= {"store": args.store, "flip": args.flip, "encoder": encode.digest}
        make = lambda items: encode(decode(items))  # noqa: E731
    job = shards.Job(
        output=Path(args.output),
        key=key,
        shape=shape,
        dtype=dtype,
        classes=classes,
        flipped=flipped,
        items=items,
        names={split: [path for path, _ in files] for split, files in items.items()},
        records_per_shard=args.records_per_shard,
        settings=settings,
    )
    shards.write(job, make, args.process_id, args.num_processes)
    if key == "moments":
        encode.report()


def _pixels(decode, items):
    for image, label in decode(items):
        yield None if image is None else {"image": image, "label": label}


class Encoder:
    """Images -> examples with the posterior moments of the VAE, on all devices of this process."""

    def __init__(self, name, size, device_batch_size, flip, store):
        autoencoder = vae.load(name)
        mesh = sharding.make_mesh(1, jax.local_devices())
        self.digest, self._name = autoencoder.identity["encoder"], name
        self.dtype, self._flip, self._size = np.dtype(store), flip, size
        self._batch_size = device_batch_size * mesh.size
        self._rows = sharding.by_row(mesh)
        self._params = jax.device_put(autoencoder.params, sharding.replicated(mesh))

        @jax.jit
        def encode(params, batch):
            with jax.default_matmul_precision("highest"):  # once for all epochs of all runs
                x = images.to_float(batch)
                views = {"moments": x} | ({"moments_flipped": x[:, :, ::-1]} if flip else {})
                return {
                    key: jnp.concatenate(autoencoder.encode(params, view), axis=-1)
                    for key, view in views.items()
                }

        self._encode = encode
        spec = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        self.shape = jax.eval_shape(encode, autoencoder.params, spec)["moments"].shape[1:]
        self._spread, self._error = moments.Spread(), 0.0

    def __call__(self, stream):
        """(image or None, label) -> examples or None. One batch is computed while one is read."""
        waiting = collections.deque()
        while rows := list(itertools.islice(stream, self._batch_size)):
            batch = np.zeros((self._batch_size, self._size, self._size, 3), np.uint8)
            for i, (image, _) in enumerate(rows):
                if image is not None:
                    batch[i] = image
            waiting.append((rows, self._encode(self._params, jax.device_put(batch, self._rows))))
            if len(waiting) > 1:
                yield from self._examples(*waiting.popleft())
        while waiting:
            yield from self._examples(*waiting.popleft())

    def _examples(self, rows, encoded):
        encoded = jax.device_get(encoded)
        for i, (image, label) in enumerate(rows):
            if image is None:
                yield None
                continue
            where = f"dataset.vae {self._name}, an image of class {label}"
            stored = {k: moments.check(where, v[i], self.dtype) for k, v in encoded.items()}
            self._measure(encoded["moments"][i], stored["moments"])
            yield stored | {"label": label}

    def _measure(self, exact, stored):
        mean, kept = (np.split(a.astype(np.float64), 2, axis=-1)[0] for a in (exact, stored))
        self._spread.add(exact)
        self._error += ((mean - kept) ** 2).sum()

    def report(self):
        """Says how the latents lie, and what the storage cost, relative to their deviation."""
        self._spread.report()
        if self._spread.count and self.dtype != np.float32:
            error = np.sqrt(self._error / self._spread.count) / self._spread.std()
            print(f"{self.dtype} storage: rms error {error:.1e} of the latents' standard deviation")
