"""Scores images that lie on disk, with the evaluator of this project.

    python -m scripts.evaluate_images --images=DIR_OR_NPZ --config=configs/load_config.py:run_b4 \\
        --config.fid.cache_ref=STATS.npz [--config.fid.metrics=fid,sfid ...]

The images are a folder of pictures of one size, or an npz with `arr_0` uint8 (N, H, W, 3), the
format of ADM's samples; a `grid.png` is left out. Evaluator, metrics and reference come from the
options `fid` and, where `fid.cache_ref` is empty, from the training images of `dataset.root`.
"""

import argparse
import json
import logging
import pathlib
import sys
import zipfile

import numpy as np
from PIL import Image

from configs import load_config


def open_images(path):
    """(read, count, image shape): `read(index)` gives images number `index` (N,) as uint8.

    Raises:
      FileNotFoundError, ValueError: no images there, or of several sizes.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        names = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
        files = [file for file in path.rglob("*") if file.suffix.lower() in names]
        files = sorted(file for file in files if file.name != "grid.png")  # of the sampling job
        if not files:
            raise FileNotFoundError(f"--images: {path} holds no pictures ({', '.join(names)})")
        shape = read_picture(files[0]).shape

        def read(index):
            images = [read_picture(files[i]) for i in index]
            for i, image in zip(index, images, strict=True):
                if image.shape != shape:
                    raise ValueError(f"{files[i]} is {image.shape}, {files[0]} is {shape}")
            return np.stack(images)

        return read, len(files), shape
    if not path.is_file():
        raise FileNotFoundError(f"--images: no such folder or file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"--images: {path} is no npz with arr_0 ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"--images: arr_0 is {images.dtype} {images.shape}, not uint8 NHWC")
    return images.__getitem__, len(images), images.shape[1:]


def read_picture(path):
    """uint8 (H, W, 3), or (H, W, 1) of a picture in gray."""
    try:
        image = Image.open(path)
        return (
            np.asarray(image)[..., None] if image.mode == "L" else np.asarray(image.convert("RGB"))
        )
    except Exception as error:  # PIL raises nearly anything on damaged or huge pictures
        raise ValueError(f"{path}: unreadable picture ({error})") from error


def evaluate(config, images):
    """Metrics of the images at a path, and what they depend on, as a dict."""
    from metrics import features, reference, scorer  # late: they bring jax
    from utils import dataset, environment, sharding

    environment.pin()
    read, count, shape = open_images(images)
    records = None if config.fid.cache_ref else dataset.open_records(config.dataset.root)
    mesh = sharding.make_mesh(fsdp=1)
    scorer.check_options(config.fid)
    score = scorer.Scorer(features.load(config.fid), mesh, config.fid, shape)
    real = reference.Reference(config.fid, score, records)
    results = real.compare(*score.read(read, count, "images"), count)
    described = {**score.describe(), **real.describe()}
    return {**results, **described, "num_samples": count, "images": str(images)}


def main(argv):
    """Runs the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate_images", description=__doc__)
    parser.add_argument("--images", required=True, help="folder of pictures, or npz with arr_0")
    try:
        config, rest = load_config.from_command_line([*argv, "--config.eval_only=True"])
        print(json.dumps(evaluate(config, parser.parse_args(rest).images), indent=1))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
