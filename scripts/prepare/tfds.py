"""Image-classification sets of TensorFlow Datasets by name -> records, without TensorFlow.

TFDS downloads and generates the examples, and we write them: its own writer needs TensorFlow to
encode PNGs. A set that TFDS has prepared already in ArrayRecord is read as it is.
"""

import contextlib
import functools
import glob
import importlib.util
import io
import sys
import types

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from scripts.prepare import shards
from utils import files, images, pictures


def run(args):
    """Runs `prepare_dataset tfds`."""
    try:
        builder = tfds.builder(args.name, **({"data_dir": args.data_dir} if args.data_dir else {}))
    except Exception as error:  # tfds explains unknown names in many lines
        known = files.first_line(error)
        raise ValueError(f"TensorFlow Datasets has no set '{args.name}' ({known})") from error
    image_key, label_key = _keys(builder.info, args.name)
    channels = builder.info.features[image_key].shape[-1]
    label = builder.info.features[label_key]
    if args.image_size is None and None in builder.info.features[image_key].shape:
        raise ValueError(f"the images of '{args.name}' differ in size; set --image_size")

    notes = pictures.Notes(lambda line: print(line, flush=True))

    def example(item):
        split, index = item
        raw = sources[split][index]
        read = functools.partial(
            pictures.read, f"{args.name}, {split} {index}", background=args.background,
            notes=lambda line, value=None: notes.tell(line, f"{args.name}, {split} {index}", value),
        )  # fmt: skip
        image = to_array(raw[image_key], channels, args.image_size, read)
        return {"image": image, "label": label.encode_example(raw[label_key])}

    with _without_tensorflow(builder):
        sources = raw_examples(builder, args.splits, image_key)
        items = {split: [(split, i) for i in range(len(raw))] for split, raw in sources.items()}
        shape = example(next(iter(items.values()))[0])["image"].shape
        done = shards.make(
            args,
            functools.partial(map, example),
            key="image",
            shape=shape,
            classes=label.names,
            items=items,
            names={split: [str(len(of_split))] for split, of_split in items.items()},
            settings={"tfds": args.name, "version": str(builder.version), "shape": shape}
            | ({} if args.background == "keep" else {"background": args.background}),
        )
    notes.report()
    return done


def to_array(image, channels, size, read):
    """Turns an image of TFDS into uint8 (h, w, 1 or 3), cropped to `size` if given.

    Its generators give arrays, paths, or files opened for reading; what it has prepared is bytes.

    read: `pictures.read` of the `file` of one image.
    """
    if not isinstance(image, np.ndarray):
        if not isinstance(image, bytes):
            image = image.read() if hasattr(image, "read") else epath.Path(image).read_bytes()
        image = np.asarray(read(file=io.BytesIO(image)).convert("L" if channels == 1 else "RGB"))
    if image.dtype != np.uint8:
        raise ValueError(f"an image of {image.dtype}; only 8 bits can be stored")
    image = image.reshape(*image.shape[:2], -1)
    if size is None:
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(images.center_crop(picture, size)).reshape(size, size, -1)


def _keys(info, name):
    keys = info.supervised_keys
    if keys and len(keys) == 2:
        image, label = (info.features[key] for key in keys)
        if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
            return keys
    raise ValueError(f"'{name}' is not a set of images with one class each; it has {info.features}")


def raw_examples(builder, splits, image_key):
    """Returns raw examples {split: sequence}: read where TFDS has prepared the set, else made."""
    try:
        if prepared := splits or builder.info.splits:
            # Its own decoder takes the numbers of a palette, or of CMYK, for those of colours.
            builder.info.features[image_key].decode_example_np = lambda content: content
            return {split: builder.as_data_source(split=split) for split in prepared}
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_dir} is not in ArrayRecord; delete it, or name another --data_dir"
        ) from error
    except AssertionError:  # how tfds says that the set is not prepared
        pass
    folder = builder.data_dir_root / "downloads"
    print(f"downloading '{builder.name}' to {folder}; without a network it gives up after minutes")
    manager = tfds.download.DownloadManager(
        download_dir=folder, url_infos=builder.url_infos, dataset_name=builder.name
    )
    try:
        generators = builder._split_generators(manager)
    except Exception as error:  # requests, urllib3, checksums
        raise ValueError(
            f"TensorFlow Datasets cannot download '{builder.name}' ({error}); without a network, "
            f"copy {folder} from a machine that has one"
        ) from error
    if not isinstance(generators, dict):  # the older form
        generators = {str(s.name): builder._generate_examples(**s.gen_kwargs) for s in generators}
    return {
        str(split): [example for _, example in examples]
        for split, examples in generators.items()
        if not splits or str(split) in splits
    }


@contextlib.contextmanager
def _without_tensorflow(builder):
    """Lets a generator that uses TensorFlow for nothing but opening files run without it."""
    module = sys.modules[type(builder).__module__]
    if importlib.util.find_spec("tensorflow") or not hasattr(module, "tf"):
        yield
        return
    theirs = module.tf

    def listdir(path):
        return [entry.name for entry in epath.Path(path).iterdir()]

    module.tf = types.SimpleNamespace(
        io=types.SimpleNamespace(
            gfile=types.SimpleNamespace(
                GFile=lambda path, mode="r": epath.Path(path).open(mode),
                exists=lambda path: epath.Path(path).exists(),
                isdir=lambda path: epath.Path(path).is_dir(),
                listdir=listdir,
                glob=glob.glob,
            )
        )
    )
    try:
        yield
    except AttributeError as error:
        if "SimpleNamespace" not in str(error):
            raise
        raise ValueError(
            f"'{builder.name}' can only be generated with TensorFlow ({error}): pip install "
            "tensorflow where it is prepared; nothing else needs it"
        ) from error
    finally:
        module.tf = theirs
