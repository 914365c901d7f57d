"""Pictures as people keep them: which files of a folder are meant, and one of them -> 8 bits."""

import collections
import contextlib
import operator
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils import files

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# What systems and programs leave in people's folders, beside names that begin with a dot.
SYSTEM_NAMES = (
    "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found",
    "system volume information", "thumbs.db", "desktop.ini",
)  # fmt: skip
ORIENTATION = 0x0112  # in EXIF data
BY_NAME = operator.attrgetter("name")


class Listing:
    """Counts what is left out while folders are read, to be told in one line."""

    def __init__(self):
        self._counts, self._examples = collections.Counter(), {}

    def leave_out(self, why, path):
        self._counts[why] += 1
        self._examples.setdefault(why, path)

    def __str__(self):
        """Returns "; left out 4: 3 in deeper folders (a/b/im0.png), ..."; "" for nothing."""
        reasons = [f"{n} {why} ({self._examples[why]})" for why, n in self._counts.items()]
        return f"; left out {self._counts.total()}: {', '.join(reasons)}" if reasons else ""


def is_ours(name):
    """Tells whether a person put something of this name there, not a system or a program."""
    return not name.startswith(".") and name.casefold() not in SYSTEM_NAMES


def entries(folder, listing, links_matter=True):
    """Lists the names in a folder that people put there, sorted: (folders, files).

    Args:
      links_matter: whether a link to nothing may stand for a folder, and is refused.

    Raises:
      ValueError: a name that is not UTF-8 or has a line break, or a link to nothing; OSError where
        the system does not let the folder be read.
    """
    folders, plain = [], []
    for entry in sorted(os.scandir(folder), key=BY_NAME):  # asks for no file's stat
        if not is_ours(entry.name):
            listing.leave_out("hidden or of the system", entry.path)
            continue
        check_name(folder, entry.name)
        if entry.is_dir():
            folders.append(entry.name)
        elif links_matter and entry.is_symlink() and not os.path.exists(entry.path):
            raise ValueError(f"{entry.path} links to {os.readlink(entry.path)}, which is not there")
        else:
            plain.append(entry.name)
    return folders, plain


def check_name(folder, name):
    """Raises ValueError for a name that lists of names cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{folder}: the name {os.fsencode(name)!r} is not UTF-8; rename it"
        ) from error
    if "\n" in name or "\r" in name:
        raise ValueError(f"{folder}: the name {name!r} holds a line break; rename it")


def wanted(folder, names, listing, extensions=EXTENSIONS):
    """Filters names of files by their endings; the others are left out."""
    chosen = [name for name in names if name.lower().endswith(extensions)]
    for name in sorted({*names}.difference(chosen)):
        ending = os.path.splitext(name)[1]
        listing.leave_out(f"with the ending {ending}" if ending else "without an ending",
                          os.path.join(folder, name))  # fmt: skip
    return chosen


def below(folder, listing, extensions=EXTENSIONS, seen=()):
    """Lists the pictures in a folder and in all folders below it: paths, sorted."""
    here = os.path.realpath(folder)
    if here in seen:
        raise ValueError(f"{folder} is a link to a folder that it is in")
    folders, plain = entries(folder, listing)
    paths = [Path(folder, name) for name in wanted(folder, plain, listing, extensions)]
    for name in folders:
        paths += below(Path(folder, name), listing, extensions, (*seen, here))
    return sorted(paths)


class Notes:
    """What was done to pictures while they were read: told with the first, and counted.

    say: function of a line.
    """

    def __init__(self, say):
        self.say, self._paths, self._largest = say, collections.defaultdict(set), {}

    def tell(self, line, path, value=None):
        """Notes a line about a picture, and a number of which the largest is told in the end."""
        if line not in self._paths:
            self.say(f"{path}, and maybe others, {line}")
        self._paths[line].add(path)
        if value is not None:
            self._largest[line] = max(value, self._largest.get(line, 0))

    def report(self):
        """Says how many there were."""
        for line, paths in self._paths.items():
            count = f"{len(paths)} images {line}"
            if (largest := self._largest.get(line)) is None:
                self.say(count)
            else:
                bits = max(int(largest).bit_length(), 1)
                hint = f": {bits} bits, so they are dark here" if bits < 16 else ""
                self.say(f"{count}; the largest value is {largest} of 65535{hint}")


def read(path, turn=False, notes=None, file=None, background=None):
    """Reads a picture of 8 bits, a PIL image in mode L or RGB, whatever the file holds.

    16 bits become 8 by 1 / 257; palettes and CMYK become RGB.

    Args:
      turn: whether the orientation in the EXIF data counts.
      notes: function of a line and at times a number, told what was done or left undone.
      background: what lies behind transparent pictures: white or black; else the colours that are
        stored where nothing is to be seen count.
      file: what to read, opened, where it is no file of its own; `path` then only names it.

    Raises:
      ValueError: no picture, a damaged one, or one of floats or 32 bits.
      OSError: the system does not let it be read.
    """
    notes = notes or (lambda line, value=None: None)
    with _opened(path, file) as image:
        deep = ";16" in str(image.tile)  # before its EXIF data: those of a PNG load it
        if not turn and _is_turned(image):
            notes("carry an EXIF orientation, which is ignored")
        turned = ImageOps.exif_transpose(image) if turn else image
        return _eight_bits(turned, image.format, notes, background, deep)


@contextlib.contextmanager
def _opened(path, file=None):
    """Opens a picture by its content (ImageNet has a PNG named JPEG); all errors in one line."""
    try:
        with Image.open(file or path) as image:
            yield image
    except Exception as error:  # PIL raises nearly anything on damaged files
        if reason := files.system_reason(error):
            raise OSError(f"{path} cannot be read: {reason}") from error
        raise ValueError(f"cannot read the image {path} ({files.first_line(error)})") from error


def _is_turned(file):
    try:  # Pillow itself turns TIFF
        return file.format != "TIFF" and file.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF data, of a picture that may be whole
        return False


def _eight_bits(image, kind, notes, background, deep):
    if image.mode == "F":
        raise ValueError("it holds floats, whose range no one knows; save it with 8 bits")
    if image.mode == "I" and kind not in ("PNG", "PPM"):
        raise ValueError("it holds 32 bits a pixel; save it with 8")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)  # 0..65535
        notes("have 16 bits a pixel, made 8 by 1 / 257", int(values.max()))
        return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    colours = image.convert("L" if is_gray(image) else "RGB")
    if deep:
        highest = max(high for _, high in np.reshape(colours.getextrema(), (-1, 2)).tolist())
        notes("have 16 bits a colour, of which Pillow takes the upper 8", 256 * highest + 255)
    if not image.has_transparency_data:
        return colours
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema()[0] < 255:
        hint = "" if background is None else "; --background=white or black lays them on that"
        if background not in ("white", "black"):
            notes(f"have transparent parts, where the colours that are stored count{hint}")
        else:
            notes(f"have transparent parts, laid on {background}")
            behind = Image.new("RGBA", layers.size, background)
            return Image.alpha_composite(behind, layers).convert(colours.mode)
    return colours


def is_gray(image):
    """Tells whether `read` makes an opened picture, by its header, one of mode L."""
    return image.mode == "L" or image.mode.startswith("I")


def shape(path):
    """Returns (height, width, 1 or 3) of what `read` makes of a file, by its header."""
    with _opened(path) as image:
        return image.height, image.width, 1 if is_gray(image) else 3
