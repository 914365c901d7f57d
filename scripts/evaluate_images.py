"""Scores images that lie on disk, with the evaluator of this project.

    python -m scripts.evaluate_images --images=DIR_OR_NPZ --config=configs/load_config.py:run_b4 \\
        --config.fid.cache_ref=STATS.npz [--config.fid.metrics=fid,sfid ...]

The images are a folder of pictures of one size, or an npz with `arr_0` uint8 (N, H, W, 3), the
format of ADM's samples; a `grid.png` is left out. For the Inception score, which compares tenths of
the images, they are shuffled as torch-fidelity does. Evaluator, metrics and reference come from the
options `fid` and, where `fid.cache_ref` is empty, from the training images of `dataset.root`.
"""

import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from configs import load_config
from utils import commands, files, npy, pictures, signals

SHUFFLE_SEED = 2020


def open_images(path, notes):
    """Returns (read, count, image shape): `read(index)` gives images number `index` (N,) as uint8.

    notes: a `pictures.Notes` of what is done to pictures.

    Raises:
      FileNotFoundError, ValueError: no images there, or of several sizes.
    """
    path = files.local(path)
    if path.is_dir():
        return open_folder(path, notes)
    if not path.is_file():
        raise FileNotFoundError(f"--images: no such folder or file: {path}")
    images = read_npz(path)

    def read(index):
        rows = images[index]
        npy.release(images)
        return rows

    return read, len(images), images.shape[1:]


def open_folder(path, notes):
    """Opens a folder of pictures as `open_images`, those in deeper folders too."""
    listing = pictures.Listing()
    files = pictures.below(path, listing)
    grids = [file for file in files if file.name == "grid.png"]  # of the sampling job
    for file in grids:
        listing.leave_out("grids of samples", file)
    files = sorted({*files}.difference(grids))
    if not files:
        known = ", ".join(pictures.EXTENSIONS)
        raise FileNotFoundError(f"--images: {path} holds no pictures ({known}){listing}")
    logging.warning("%s: %d pictures%s", path, len(files), listing)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shapes = list(pool.map(pictures.shape, files))  # before anything goes through the network
    for file, shape in zip(files, shapes, strict=True):
        if shape[:2] != shapes[0][:2]:
            raise ValueError(
                f"{file} is {shape[0]}x{shape[1]}, {files[0]} {shapes[0][0]}x{shapes[0][1]} "
                "(height x width): pictures of one size are compared"
            )
    channels = max(shape[2] for shape in shapes)
    if gray := sum(shape[2] == 1 for shape in shapes) if channels == 3 else 0:
        logging.warning("%d of %d pictures are gray, and read as colour", gray, len(files))

    def read_one(file):
        tell = lambda line, value=None: notes.tell(line, file, value)  # noqa: E731
        image = pictures.read(file, notes=tell).convert("L" if channels == 1 else "RGB")
        return np.asarray(image).reshape(*shapes[0][:2], channels)

    def read(index):
        return np.stack([read_one(files[i]) for i in index])

    return read, len(files), (*shapes[0][:2], channels)


def read_npz(path):
    """Maps the images of an npz, uint8 (N, H, W, C); they are read when they are asked for."""
    try:
        with path.open("rb") as file:
            if file.read(len(npy.MAGIC)) == npy.MAGIC:
                raise ValueError("it is an npy, one array without a name: save it by np.savez")
        if "arr_0" not in (names := npy.names(path)):
            raise ValueError(f"it holds {', '.join(names) or 'nothing'}")
        images = npy.member(path, "arr_0")
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        reason = files.system_reason(error) or files.first_line(error)
        raise ValueError(f"--images: {path} is no npz with arr_0 ({reason})") from error
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
    """Reorders `read`: images often come sorted by class, and the Inception score compares
    tenths of them. The order is that of torch-fidelity."""
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    return lambda index: read(order[index])


def evaluate(config, images):
    """Computes metrics of the images at a path, and what they depend on, as a dict."""
    from metrics import evaluators, features, reference, scorer  # late: they bring jax
    from utils import dataset, environment, sharding

    environment.pin()
    notes = pictures.Notes(logging.warning)
    read, count, shape = open_images(images, notes)
    options = evaluators.fill(config.fid)
    if others := {*options.metrics}.difference(evaluators.of_features(options.metrics)):
        raise ValueError(f"fid.metrics: {min(others)} asks what images were drawn by: eval_only")
    data = config.dataset
    records = None if config.fid.cache_ref else dataset.open_records(data.root, stage=data.stage)
    mesh = sharding.make_mesh(fsdp=1)
    score = scorer.Scorer(features.load(options), mesh, options, shape)
    real = reference.Reference(options, score, records)
    results = real.compare(*score.read(shuffled(read, count), count, "images"), count)
    notes.report()
    described = {"evaluator": evaluators.describe(options), **score.describe(), **real.describe()}
    described["shuffled_by_seed"] = SHUFFLE_SEED
    return {**results, **described, "num_samples": count, "images": str(images)}


def main(argv):
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = commands.parser("scripts.evaluate_images", __doc__)
    parser.add_argument("--images", required=True, help="folder of pictures, or npz with arr_0")
    if {"-h", "--help"}.intersection(argv):
        parser.parse_args(["--help"])
    try:
        config, rest = load_config.from_command_line([*argv, "--config.eval_only=True"])
        print(json.dumps(evaluate(config, parser.parse_args(rest).images), indent=1))
    except (ValueError, OSError) as error:
        print(f"error: {files.line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main(sys.argv[1:]))
