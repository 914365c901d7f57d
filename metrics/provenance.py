"""What reference statistics say of themselves: which images, how many, how large, how resized.

The npz holds it beside the moments, each entry an array of no dimension: `split`, `number`,
`size` (of a side, pixels), `resize`, `files` (digest of the names, in order), `images` (digest of
the pixels) and `weights` (digest of the feature network). Files of other makers are known by the
names of their arrays, or not at all.
"""

import logging

from utils import files, npy

FIELDS = {"split": str, "number": int, "size": int, "resize": str, "files": str, "images": str,
          "weights": str}  # fmt: skip
LARGEST = 2**30  # bytes of an array of statistics


def of_file(file):
    """Returns what an opened npz says of its statistics: entries of FIELDS, and `origin`.

    Raises:
      ValueError: an entry that cannot be meant, or arrays far too large for statistics.
    """
    said = {}
    for name, kind in FIELDS.items():
        if name in file.files:
            value = file[name]
            if value.shape != () or value.dtype.kind not in ("U" if kind is str else "iu"):
                raise ValueError(f"{name} is {value.dtype} {value.shape}, not {kind.__name__}")
            said[name] = kind(value)
    if "images" in said:
        said["origin"] = "this project"
    elif "ref_mu" in file.files:
        said |= {"origin": "the published MeanFlow code", "resize": "half_pixel"}
    elif "resize" not in said and {"mu_s", "arr_0"} & set(file.files):
        said |= {"origin": "ADM", "resize": "tf1"}
    return said


def of_path(path):
    """Does as `of_file` for a path; the statistics are not looked at. ValueError: it is none."""
    with files.reading(path, "not a readable npz of reference statistics"):
        with npy.load_npz(path) as file:
            return of_file(file)


def check_sizes(file, names):
    """Raises ValueError where an npz would inflate to more than statistics can be."""
    for info in file.zip.infolist():
        if info.filename.removesuffix(".npy") in names and info.file_size > LARGEST:
            raise ValueError(f"{info.filename} would take {info.file_size} bytes")


def describe(said, path, size):
    """Returns what a result says of its reference; tells people too, and warns of an unknown one.

    Args:
      said: from `of_file`.
      path: the file.
      size: side of the generated images, pixels.
    """
    if said.get("size", size) != size:
        logging.warning(
            "%s is of images of %d pixels, and those generated have %d", path, said["size"], size
        )
    if "images" in said:
        known = {name: said.get(name, "?") for name in ("split", "number", "size", "images")}
        logging.info("%s: statistics of %s %s images", path, known["number"], known["split"])
        return {f"reference_{name}": value for name, value in known.items()}
    if "origin" in said:
        logging.info("%s: statistics by %s (by its names)", path, said["origin"])
        return {"reference_origin": said["origin"]}
    logging.warning(
        "%s does not say of which images it is%s: taken on trust, and marked in results.json",
        path, "" if "resize" in said else " nor how they were resized",
    )  # fmt: skip
    return {"reference_origin": "unknown"}


def differences(said, asked):
    """Returns what a file says differently from what is asked for, as a list of lines; see FIELDS.

    `images` is known only when all of them are read, so it is not asked for here.
    """
    return [
        "other files" if name == "files" else f"{name} {said[name]}, asked for {value}"
        for name, value in asked.items()
        if name in said and said[name] != value
    ]
