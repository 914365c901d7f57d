"""Images -> records of latents or pixels.

What only latents or statistics need is imported late: pixels do not wait for it.
"""

import collections
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from scripts.prepare import class_folders, conditions, shards
from utils import dataset, environment, files, images, pictures


def run(args):
    """Runs `prepare_dataset images`: records, statistics, or both.

    Returns whether the records are complete.
    """
    listing = pictures.Listing()
    root = files.local(args.input)
    classes, items, find, settings = class_folders.find_images(root, args, listing)
    names = () if isinstance(classes, int) else classes
    said = f"{len(names) or classes or 'no'} classes; {counted(items)} images"
    print(f"{args.input}: {said}{listing}", flush=True)
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        i = next(i for i, name in enumerate(sorted(names, key=int)) if name != names[i])
        print(f"the class folders are numbers, and sorted as text: label {i} is {names[i]}")
    fetch = conditions.in_folders(args.conditions.values(), listing)
    return convert(args, classes, items, find, settings, fetch)


def counted(items):
    """Returns in words how many items {split: [item]} there are."""
    return ", ".join(f"{len(rows)} {split}" for split, rows in items.items())


def convert(args, classes, items, find, settings=None, fetch=None):
    """Writes records of labelled images, statistics, or both, as `args` asks for.

    Args:
      items: {split: [(name, label)]}, in the order of the records.
      find: function of a name -> (where the image is, for people; opened file of it, or None where
        that is a path). Called from several threads.
      settings: beside the options, what has to be equal for a run to go on with another's shards.
      fetch: see `conditions.Beside`; what `args.conditions` names is stored beside the images.

    Returns whether the records are complete.
    """
    environment.pin()
    notes, complete = Notes(args.on_bad_image), False
    decode = functools.partial(
        decoded,
        find=find,
        size=args.image_size,
        workers=args.workers,
        notes=notes,
        read=functools.partial(
            pictures.read, turn=args.exif_orientation, background=args.background
        ),
    )
    split = next(iter(items))  # whose statistics are made
    if args.compute_fid:
        from metrics import inception_weights
        from scripts.prepare import statistics

        inception_weights.find(args.inception_weights)  # its lack is told before hours of encoding
        statistics.check(args, split, items[split])
    if args.compute_latent:
        complete = write_records(args, classes, items, decode, settings or {}, fetch)
    if args.compute_fid:
        statistics.write(args, split, items[split], decode)
    notes.report()
    return complete


# Decoding


class Notes(pictures.Notes):
    """What images are told of; unreadable ones by policy: "fail" at the first, or "skip"."""

    def __init__(self, policy):
        super().__init__(lambda line: print(line, flush=True))
        self.policy, self.problems = policy, set()

    def add(self, problem):
        if self.policy == "fail":
            raise ValueError(f"{problem}; --on_bad_image=skip leaves such images out")
        if problem not in self.problems:  # the statistics read them a second time
            self.say(f"left out: {problem}")
        self.problems.add(problem)

    def report(self):
        super().report()
        if self.problems:
            self.say(f"{len(self.problems)} unreadable images were left out")


def decoded(items, find, size, workers, notes, read=pictures.read):
    """Decodes (name, label): yields (uint8 (size, size, 3) or None where unreadable, label).

    Decodes and crops in `workers` threads (PIL lets go of the interpreter), not far ahead.
    """
    decode = functools.partial(_decode, find, size, read)
    for image, label, problem, told in _in_order(decode, items, workers):
        for line, path, value in told:
            notes.tell(line, path, value)
        if problem:
            notes.add(problem)
        yield image, label


def _in_order(work, items, workers):
    """Yields work(item) of each item, computed by threads, not far ahead."""
    waiting = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 8 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def _decode(find, size, read, item):
    told = []
    try:
        path, file = find(item[0])
        image = read(
            path, notes=lambda line, value=None: told.append((line, path, value)), file=file
        )
        return np.asarray(images.center_crop(_colour(image), size)), item[1], None, told
    except ValueError as error:
        return None, item[1], str(error), told


def _colour(image):
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


# Records


def write_records(args, classes, items, decode, settings, fetch=None):
    """Writes latents, or with `--vae=none` pixels, as records; returns whether all are there."""
    settings = {"image_size": args.image_size, "vae": args.vae} | settings
    if args.exif_orientation:
        settings["exif_orientation"] = True
    if args.background != "keep":
        settings["background"] = args.background
    if args.vae == "none":
        key, shape, dtype, flipped = "image", (args.image_size, args.image_size, 3), np.uint8, False
        encoder, make = None, functools.partial(_pixels, decode, args.encoding, args.workers)
        if args.encoding != "raw":
            settings["encoding"] = args.encoding
    elif args.encoding != "raw":
        raise ValueError(f"--encoding={args.encoding} is for pixels: choose --vae=none")
    else:
        from scripts.prepare.encoder import Encoder

        encoder = functools.partial(
            Encoder, args.vae, args.image_size, args.device_batch_size, args.flip, args.store
        )
        encode = encoder()
        key, shape, dtype, flipped = "moments", encode.shape, encode.dtype, args.flip
        settings |= {"store": args.store, "flip": args.flip, "encoder": encode.digest}
        make = lambda items: encode(decode(items))  # noqa: E731
    names = {split: [name for name, _ in rows] for split, rows in items.items()}
    make, more = conditions.beside(args, make, fetch, items, args.image_size, shape, encoder)
    complete = shards.make(
        args, make, key=key, shape=shape, dtype=dtype, classes=classes, flipped=flipped,
        items=items, names=names, settings=settings | more.pop("settings", {}), **more
    )  # fmt: skip
    if key == "moments":
        encode.report()
    return complete


def _pixels(decode, encoding, workers, items):
    """Yields an example for each item; pictures are encoded by threads, not far ahead."""

    def made(row):
        image, label = row
        if image is None:
            return None
        picture = None if encoding == "raw" else dataset.compressed(image, encoding)
        return dataset.example(label, picture, image=image)

    rows = decode(items)
    return map(made, rows) if encoding == "raw" else _in_order(made, rows, workers)
