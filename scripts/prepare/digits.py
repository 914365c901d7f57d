"""The handwritten digits of scikit-learn -> records of pixels."""

import errno

import numpy as np
from sklearn.datasets import load_digits

from utils import dataset, files


def run(args):
    """Runs `prepare_dataset digits`: 1,797 real 8x8 images, 0..16 stretched to 0..255.

    Returns True: the dataset is complete.
    """
    output = files.path(args.output)
    if dataset.is_dataset(output):
        print(f"{output} is there already; nothing to do")
        return True
    digits = load_digits()
    known = [str(name) for name in digits.target_names]
    classes = list(args.classes) or known
    if not set(classes) <= set(known):
        raise ValueError(f"--classes: are of {','.join(known)}, got {','.join(classes)}")
    chosen = np.isin(digits.target_names[digits.target].astype(str), classes)
    images = np.round(digits.images[chosen] * 255 / 16).astype(np.uint8)[..., None]  # (N, 8, 8, 1)
    labels = [classes.index(str(target)) for target in digits.target[chosen]]
    files.make_folder(output.parent)
    try:
        # A folder of its own until it is whole: it is small, and made again if interrupted.
        with files.complete(output) as unfinished:
            unfinished.mkdir()
            examples = ({"image": x, "label": y} for x, y in zip(images, labels, strict=True))
            count = dataset.write_shard(dataset.shard_path(unfinished, "train", 0, 1), examples)
            dataset.write_metadata(
                unfinished, "image", images.shape[1:], np.uint8, classes, {"train": [count]}
            )
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not dataset.is_dataset(output):
            raise ValueError(f"{output} holds something else; name a new folder") from error
        print(f"{output} is there already; another process was faster")
        return True
    print(f"{count} images of {len(classes)} classes -> {output}")
    return True
