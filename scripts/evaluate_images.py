"""Scores images that lie on disk, with the evaluator of this project.

    python -m scripts.evaluate_images --images=DIR_OR_NPZ --config=configs/load_config.py:run_b4 \\
        --config.fid.cache_ref=STATS.npz [--config.fid.metrics=fid,sfid ...]

The images are a folder of pictures of one size, or an npz with `arr_0` uint8 (N, H, W, 3), the
format of ADM's samples; a `grid.png` is left out. For the Inception score, which compares tenths of
the images, they are shuffled as torch-fidelity does. Evaluator, metrics and reference come from the
options `fid` and, where `fid.cache_ref` is empty, from the training images of `dataset.root`.
"""

import argparse
import json
import logging
import pathlib
import sys

import numpy as np

from configs import load_config
from utils import pictures, signals
from utils.files import system_reason

SHUFFLE_SEED = 2020


def open_images(path):
    """(read, count, image shape): `read(index)` gives images number `index` (N,) as uint8.

    Raises:
      FileNotFoundError, ValueError: no images there, or of several sizes.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"--images: no such folder or file: {path}")
    images = read_npz(path)
    return images.__getitem__, len(images), images.shape[1:]


def open_folder(path):
    """`open_images` of a folder of pictures, those in deeper folders too."""
    listing = pictures.Listing()
    files = pictures.below(path, listing)
    grids = [file for file in files if file.name == "grid.png"]  # of the sampling job
    for file in grids:
        listing.leave_out("grids of samples", file)
    files = sorted({*files}.difference(grids))
    if not files:
        known = ", ".join(pictures.EXTENSIONS)
        raise FileNotFoundError(f"--images: {path} holds no pictures ({known}); {listing}")
    logging.warning("%s: %d pictures%s", path, len(files), f"; {listing}" if str(listing) else "")
    told = set()

    def note(line):
        if line not in told:
            logging.warning("pictures of %s %s", path, line)
        told.add(line)

    def read_one(file):
        image = np.asarray(pictures.read(file, notes=note))
        return image[..., None] if image.ndim == 2 else image

    shape = read_one(files[0]).shape

    def read(index):
        images = [read_one(files[i]) for i in index]
        for i, image in zip(index, images, strict=True):
            if image.shape != shape:
                raise ValueError(f"{files[i]} is {image.shape}, {files[0]} is {shape}")
        return np.stack(images)

    return read, len(files), shape


def read_npz(path):
    """The images of an npz, uint8 (N, H, W, C)."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is an npy, one array without a name: save it by np.savez")
        with file:
            if "arr_0" not in file.files:
                raise ValueError(f"it holds {', '.join(file.files) or 'nothing'}")
            images = file["arr_0"]
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        reason = system_reason(error) or (str(error).strip() or type(error).__name__)
        raise ValueError(
            f"--images: {path} is no npz with arr_0 ({reason.splitlines()[0]})"
        ) from error
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise ValueError(
            f"--images: {path}: arr_0 {images.shape} is NCHW; NHWC is expected, which "
            "arr_0.transpose(0, 2, 3, 1) is"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"--images: {path}: arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, 1 or 3)"
        )
    if not len(images):
        raise ValueError(f"--images: {path}: arr_0 holds no images")
    return images


def shuffled(read, count):
    """`read` in another order: images often come sorted by class, and the Inception score compares
    tenths of them. The order is that of torch-fidelity."""
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    return lambda index: read(order[index])


def evaluate(config, images):
    """Metrics of the images at a path, and what they depend on, as a dict."""
    from metrics import evaluators, features, reference, scorer  # late: they bring jax
    from utils import dataset, environment, sharding

    environment.pin()
    read, count, shape = open_images(images)
    options = evaluators.fill(config.fid)
    records = None if config.fid.cache_ref else dataset.open_records(config.dataset.root)
    mesh = sharding.make_mesh(fsdp=1)
    score = scorer.Scorer(features.load(options), mesh, options, shape)
    real = reference.Reference(options, score, records)
    results = real.compare(*score.read(shuffled(read, count), count, "images"), count)
    described = {"evaluator": evaluators.describe(options), **score.describe(), **real.describe()}
    described["shuffled_by_seed"] = SHUFFLE_SEED
    return {**results, **described, "num_samples": count, "images": str(images)}


def main(argv):
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, help="folder of pictures, or npz with arr_0")
    if {"-h", "--help"}.intersection(argv):
        parser.parse_args(["--help"])
    try:
        config, rest = load_config.from_command_line([*argv, "--config.eval_only=True"])
        print(json.dumps(evaluate(config, parser.parse_args(rest).images), indent=1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main(sys.argv[1:]))
