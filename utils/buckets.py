"""Buckets of Google Cloud Storage: everything that utils/files.py does differently for gs://.

Objects appear whole, and are replaced whole. There are no folders, no renames, no second names, and
nothing grows. gcsfs (through etils.epath) lists, reads and writes; tensorstore writes under a
condition (utils/leases.py). gcsfs' listings are switched off: a process that has listed a folder
once would never see what others write there, and would read objects cut at their former length.
"""

import base64
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import logging
import os
import re
import socket
import tempfile
import threading
from pathlib import Path

SCHEME = "gs://"
ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/")  # slashes may have been joined
ANSWER = 60  # seconds in which a bucket has to answer at the start of a job
MARKER = "commit_success.txt"  # orbax writes it last into a checkpoint
LIBRARIES = ("aiohttp.", "gcsfs.", "requests.", "google.api_core.")  # whose errors are the way's
LAST = (MARKER, "dataset_info.json", "config.json")  # what makes a folder complete

# gcsfs reads it when it is imported, and else asks for the kind of each bucket, with a warning.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


# Reaching them --------------------------------------------------------------------------------


@functools.cache
def filesystem():
    """Returns gcsfs' file system without listings; etils.epath has its own of the same class.

    What cannot be asked is no answer there: to gcsfs a folder in a bucket that refuses or does not
    answer is none, as if a run had no checkpoints yet.

    Raises:
      ValueError: gcsfs is not installed.
    """
    try:
        import fsspec
        from gcsfs import GCSFileSystem
        from gcsfs.core import GCSFile
    except ImportError as error:
        raise ValueError(
            f"{SCHEME} needs gcsfs, which is not installed: pip install -r requirements-gcs.txt"
        ) from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it raises it prints, too
    logging.getLogger("fsspec").setLevel(logging.WARNING)

    class Whole(GCSFile):
        # What fits one request goes in one, which can be sent again: where the answer to the last
        # of a session's is lost, the session may be unknown when it is asked again.
        def _initiate_upload(self):
            pass  # by the first piece of several

        def _upload_chunk(self, final=False):
            if final and not self.offset:
                return self._simple_upload()
            if self.location is None:
                self.closed = True  # should this fail: what is left is not to be put as the whole
                super()._initiate_upload()
                self.closed = False
            return super()._upload_chunk(final)

    class Strict(GCSFileSystem):
        def _open(self, path, mode="rb", block_size=None, **options):
            kind, size = Whole if mode == "wb" else GCSFile, block_size or self.default_block_size
            return kind(self, path, mode, size, **{"consistency": self.consistency} | options)

        async def _isdir(self, path):
            return await self._is(path, "directory")

        async def _isfile(self, path):
            return await self._is(path, "file")

        async def _is(self, path, kind):
            with contextlib.suppress(FileNotFoundError):
                return (await self._info(path))["type"] == kind
            return False

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Strict, clobber=True)
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return fsspec.filesystem("gs")


def is_address(name, what=""):
    """Tells whether a name is one in a bucket, gs://BUCKET/...

    Raises:
      ValueError: an address of another kind; `what` is put in front.
    """
    if ADDRESS.match(name) and not name.startswith(SCHEME):
        raise ValueError(
            f"{what}{name}: of addresses only {SCHEME}BUCKET/... can be read and written; take a "
            "folder of a file system, or mount what this names"
        )
    return name.startswith(SCHEME)


def path(name):
    """Returns the path of an object, as `etils.epath` has it; `name` begins with gs://."""
    bucket = name.removeprefix(SCHEME).partition("/")[0]
    if not bucket:
        raise ValueError(f"{name}: expected {SCHEME}BUCKET/...")
    filesystem()
    from etils import epath  # late: nobody else needs it

    return epath.Path(name)


def check(folder, write=True):
    """Asks a bucket for an answer, and whether a folder in it can be written to.

    Raises:
      OSError: in one line, what is wrong.
    """
    probe = folder / f"unfinished-probe-{socket.gethostname()}-{os.getpid()}"

    def ask():
        if not write:
            return folder.exists()
        probe.write_bytes(b"x")
        with contextlib.suppress(FileNotFoundError):  # removed, and the answer was lost
            probe.unlink()
        return True

    pool = concurrent.futures.ThreadPoolExecutor(1)
    asked = pool.submit(ask)
    pool.shutdown(wait=False)
    with explained(folder):
        try:
            asked.result(ANSWER)
        except TimeoutError as error:
            raise OSError(f"{folder}: no answer within {ANSWER} s") from error


@contextlib.contextmanager
def explained(place):
    """Makes one line of whatever goes wrong in the block with the object or folder `place`."""
    try:
        yield
    except Exception as error:
        if text := reason(error):
            raise OSError(f"{place}: {text}") from error
        raise


def line(error):
    """Returns what an exception says; in one line what a bucket has said."""
    said, first = reason(error), str(error).strip().partition("\n")[0]
    return f"{first}: {said}" if said and SCHEME not in first else str(error)


def reason(error):
    """Returns what a bucket said, if an exception comes of that and not of an object; or ""."""
    while error is not None:
        text, kind = str(error).strip(), type(error)
        line = (text or kind.__name__).splitlines()[-1][:200]
        code = str(getattr(error, "code", ""))
        if code in ("401", "403") or text.startswith("Forbidden") or "PERMISSION_DENIED" in text:
            return f"access is denied ({line})"
        if kind is FileNotFoundError and "/storage/v1/b/" in text:
            return "there is no such bucket, or no such object in it"
        if kind.__module__.startswith("google.auth"):
            return f"no credentials ({line}); gcloud auth application-default login makes some"
        if kind.__module__.startswith(LIBRARIES):
            return f"Cloud Storage cannot be reached or fails ({line})"
        if any(word in text for word in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")):
            return f"Cloud Storage cannot be reached or fails ({line})"
        error = error.__cause__ or error.__context__
    return ""


# Whole objects --------------------------------------------------------------------------------


@contextlib.contextmanager
def outgoing(remote, fresh=False):
    """Gives a path on this machine for a file or a folder that is put at `remote` at the end.

    Raises:
      FileExistsError: with `fresh`, where something of the same name is there.
    """
    with tempfile.TemporaryDirectory(prefix="unfinished-") as folder:
        here = Path(folder, remote.name)
        yield here
        for file in here.rglob("*") if fresh else ():
            place = remote / file.relative_to(here).as_posix()
            if file.is_file() and place.exists():
                raise FileExistsError(f"{place} is there already: name another folder")
        upload(here, remote)


def upload(local, remote):
    """Puts a file or a folder of this machine into a bucket.

    Of a folder what makes it complete comes last, so that what is cut off counts for nothing.
    """
    fs = filesystem()
    with explained(remote):
        if not local.is_dir():
            return fs.put_file(str(local), str(remote))
        found = sorted(p for p in local.rglob("*") if p.is_file())
        for name in sorted((p.relative_to(local).as_posix() for p in found), key=last):
            fs.put_file(str(local / name), f"{remote}/{name}")


def last(name):
    """Places a name in the order: what makes a folder complete comes last, outermost last."""
    return name.rpartition("/")[2] in LAST, -name.count("/")


def remove(remote):
    """Removes an object, or all below a name; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError), explained(remote):
        if not filesystem().exists(str(remote)):
            return
        filesystem().rm(str(remote), recursive=True)


def copy(source, target):
    """Copies all below a name to another one within Cloud Storage; what makes it complete last."""
    fs = filesystem()
    with explained(source):
        names = [f"{SCHEME}{name}" for name in fs.find(str(source))]
        for name in sorted(names, key=last):
            fs.cp_file(name, f"{target}{name.removeprefix(str(source))}")


# Copies on this machine -----------------------------------------------------------------------


def stage(remote, local, wanted=lambda name: True, progress=None):
    """Copies an object, or all below a name, to this machine; what is there already stays.

    Size and checksum of each object are compared with what arrived. Cut off, the same call goes on.

    Args:
      remote: from `path`.
      local: where the copy is to lie, a pathlib.Path.
      wanted: which names below `remote` to copy.
      progress: function (iterable, total) -> iterable, which shows how far it is.

    Raises:
      FileNotFoundError: there is nothing at `remote`; OSError: an object did not arrive whole.
    """
    with explained(remote):
        found = filesystem().find(str(remote), detail=True)
    root = str(remote).removeprefix(SCHEME)
    names = {name.removeprefix(root).lstrip("/"): about for name, about in found.items()}
    names = {name: about for name, about in names.items() if wanted(name)}
    if not names:
        raise FileNotFoundError(f"{remote}: there is nothing")
    missing = [
        (name, about) for name, about in names.items() if not _is_there(local, name, about)
    ]  # fmt: skip
    if not missing:
        return
    beside = local.parent.glob(f"unfinished-{glob.escape(local.name)}-*")
    for old in [*local.rglob("unfinished-*"), *beside]:  # of processes that were killed
        old.unlink(missing_ok=True)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = pool.map(lambda item: _fetch(remote, local, *item), missing)
        for _ in progress(done, len(missing)) if progress else done:
            pass


def _place(local, name):
    return local / name if name else local


def _note(local, name):
    """Returns the file that says which object a copy is of, beside the folder of copies."""
    return local.with_name(f".{local.name}.objects") / f"{name}.object"


def _is_there(local, name, about):
    file = _place(local, name)
    try:
        return file.stat().st_size == about["size"] and _note(local, name).read_text() == _digest(
            about
        )
    except OSError:
        return False


def _digest(about):
    return f"{about.get('md5Hash') or about.get('crc32c')} {about.get('generation')}"


def _fetch(remote, local, name, about):
    source, file = f"{remote}/{name}" if name else str(remote), _place(local, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"unfinished-{file.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        for attempt in range(3):  # a connection that is cut leaves too little
            with explained(source):
                filesystem().get_file(source, str(unfinished))
            if _is_whole(unfinished, about):
                break
            logging.warning("%s did not arrive whole (attempt %d)", source, attempt + 1)
        else:
            raise OSError(f"{source} did not arrive whole: size or checksum differ")
        os.replace(unfinished, file)
        note = _note(local, name)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(_digest(about))
    finally:
        unfinished.unlink(missing_ok=True)


def _is_whole(file, about):
    if file.stat().st_size != about["size"]:
        return False
    if about.get("md5Hash"):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "md5").digest()
        return base64.b64encode(digest).decode() == about["md5Hash"]
    import google_crc32c  # gcsfs brings it; composed objects have this alone

    total = google_crc32c.Checksum()
    with file.open("rb") as opened:
        while block := opened.read(2**22):
            total.update(block)
    return base64.b64encode(total.digest()).decode() == about["crc32c"]
