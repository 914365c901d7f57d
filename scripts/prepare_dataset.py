"""Turns images, published latents or a named set into records. See docs/data.md.

python -m scripts.prepare_dataset digits --output DIR
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from utils import dataset


def prepare_digits(args):
    """The digits of scikit-learn: 1,797 real 8x8 images, values 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits  # only here: nothing else needs scikit-learn

    if is_dataset(args.output):
        return print(f"{args.output} is there already; nothing to do")
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]  # (N, 8, 8, 1)
    classes = [str(name) for name in digits.target_names]
    write_small(args.output, {"train": (images, digits.target)}, classes)
    print(f"{len(images)} images of {len(classes)} classes -> {args.output}")


def write_small(output, splits, classes):
    """Writes splits {name: (images uint8 (N, h, w, c), labels (N,))} as one finished folder."""
    output = Path(output)
    unfinished = output.with_name(f"{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        lengths = {}
        for split, (images, labels) in splits.items():
            examples = ({"image": x, "label": y} for x, y in zip(images, labels, strict=True))
            path = dataset.shard_path(unfinished, split, 0, 1)
            lengths[split] = [dataset.write_shard(path, examples)]
        dataset.write_metadata(unfinished, "image", images.shape[1:], np.uint8, classes, lengths)
        try:
            unfinished.rename(output)
        except OSError as error:
            raise ValueError(f"{output} exists and holds something else; name a new folder") from (
                error
            )
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_dataset(root):
    return (Path(root) / "dataset_info.json").exists()


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.prepare_dataset", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="the handwritten digits of scikit-learn")
    digits.add_argument("--output", required=True, help="folder to make")
    digits.set_defaults(run=prepare_digits)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"prepare_dataset: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
