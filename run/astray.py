"""Paths that hold no weights: said as what they are, with a place near them that does."""

import zipfile

from formats import hugging_face, published, published_imf
from run import layout
from utils import files

NEAR = 3  # folders above that are looked at, and places that are named
OTHER_FILES = {
    **dict.fromkeys((".pt", ".ckpt", ".bin"), "a file of PyTorch, which only init_from takes"),
    **dict.fromkeys((".gz", ".tgz", ".tar", ".xz", ".zst"), "an archive: unpack it"),
    **dict.fromkeys((".json", ".jsonl", ".yml", ".yaml", ".md", ".png", ".npz"), "a file"),
    ".safetensors": f"a file without this project's {hugging_face.CONFIG} beside it",
}


def check(path):
    """Raises FileNotFoundError with one line where a path cannot be one of weights.

    Args:
      path: what was asked for. What is wrong within a file of weights says its reader.
    """
    place = files.path(path)
    if place.suffix == ".pth" or _holds(place):
        return
    if not place.exists():
        raise FileNotFoundError(f"{path} does not exist{_advice(place)}")
    if kind := _kind(place):
        raise FileNotFoundError(
            f"{path}: neither a run with checkpoints nor a published or exported checkpoint, but "
            f"{kind}{_advice(place)}"
        )


def _holds(place):
    """Tells whether a folder holds weights that are read, or is the folder's one file of them."""
    try:
        known = layout.steps(place) or hugging_face.find(place) or published_imf.find(place)
        return bool(known or (place.is_dir() and published.is_published(place)))
    except OSError:  # a folder of others
        return False


def _kind(place):
    """Names what lies at a path that is none of weights; "": a file that may be."""
    if place.is_dir():
        return "a folder" if any(place.iterdir()) else "an empty folder"
    if zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            torch = any(name.endswith("/data.pkl") for name in archive.namelist())
        return OTHER_FILES[".pt"] if torch else "a zip archive: unpack it"
    return OTHER_FILES.get(place.suffix, "")


def _above(place):
    """Returns the nearest folder above a path that holds weights; or None."""
    return next((above for above in list(place.parents)[:NEAR] if _holds(above)), None)


def _advice(place):
    if above := _above(place):
        step = place.name if place.parent == layout.folder(above) else ""
        step = f", its checkpoint {step}" if layout.NUMBER.fullmatch(step) else ""
        return f" of {above}: give that folder{step}"
    try:
        inner = [*place.glob("*/"), *place.glob("*/*/")] if place.is_dir() else []
    except OSError:
        inner = []
    inner = sorted(str(path) for path in inner if _holds(path))
    if not inner:
        return ""
    return f"; in it {', '.join(inner[:NEAR])}{', ...' * (len(inner) > NEAR)}: give one of them"
