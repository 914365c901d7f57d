"""The files of a set, in a folder or in a `.zip`, by their names below it."""

import io
import zipfile
from pathlib import Path

from utils import files, pictures


def open_tree(path, listing, endings):
    """Opens the files with one of the endings at a path, a `Folder` or a `Zip`; counts others.

    Raises:
      FileNotFoundError: nothing is there; ValueError: no .zip, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        return Folder(path, listing, endings)
    if not path.is_file():
        raise FileNotFoundError(f"no folder, and no file, at {path}")
    return Zip(path, listing, endings)


class Folder:
    """Files in a folder and in all below it; `names` are sorted."""

    def __init__(self, root, listing, endings):
        self.root = root
        paths = pictures.below(root, listing, tuple(endings))
        self.names = [path.relative_to(root).as_posix() for path in paths]

    def where(self, name):
        """Returns the place of a file, for people."""
        return f"{self.root}/{name}"  # a Path for each of millions is slow

    def read(self, name):
        """Returns the bytes of a file. Safe to call from several threads."""
        path = self.where(name)
        with files.reading(path, "not a file"), open(path, "rb") as file:
            return file.read()

    def open(self, name):
        """Returns the `file` of `pictures.read`: None, as the place is one already."""
        return None


class Zip:
    """The same of the members of a `.zip`."""

    def __init__(self, path, listing, endings):
        self.root = path
        with files.reading(path, "not a .zip, or damaged"):
            self._archive = zipfile.ZipFile(path)
        names = [m.filename for m in self._archive.infolist() if not m.is_dir()]
        ours = [name for name in names if all(map(pictures.is_ours, name.split("/")))]
        for name in {*names}.difference(ours):
            listing.leave_out("hidden or of the system", self.where(name))
        self.names = sorted(pictures.wanted(path, ours, listing, tuple(endings)))
        for name, other in zip(self.names, self.names[1:], strict=False):
            pictures.check_name(path, name)
            if name == other:
                raise ValueError(f"{self.where(name)} is there twice")

    def where(self, name):
        """Returns the place of a member, for people."""
        return f"{self.root}:{name}"

    def read(self, name):
        """Returns the bytes of a member. Safe to call from several threads."""
        with files.reading(self.where(name), "damaged"):
            return self._archive.read(name)

    def open(self, name):
        """Opens the member as a file."""
        return io.BytesIO(self.read(name))
