"""Makes the datasets that training reads (docs/data.md).

python -m scripts.prepare_dataset digits --output DIR
python -m scripts.prepare_dataset images --input IMAGENET --output DIR --image_size 256
python -m scripts.prepare_dataset pt --input FOLDER_OF_PT_FILES --output DIR
python -m scripts.prepare_dataset latents --input CACHE_OF_ANOTHER_PROJECT --output DIR
python -m scripts.prepare_dataset arrays --input FOLDER_OF_NPY_OR_NPZ --output DIR
python -m scripts.prepare_dataset values --input NPZ_NPY_OR_PARQUET --output DIR
python -m scripts.prepare_dataset huggingface --input FOLDER_OF_PARQUET --output DIR
python -m scripts.prepare_dataset webdataset --input FOLDER_OF_TAR --output DIR
python -m scripts.prepare_dataset cifar10 --input cifar-10-python.tar.gz --output DIR
python -m scripts.prepare_dataset tfds --name oxford_flowers102 --image_size 64 --output DIR
python -m scripts.prepare_dataset preview --root DIR
"""

import argparse
import importlib
import os
import sys

from utils import commands, files, signals

DAY = 24 * 3600  # seconds
DECODER = "draws the preview: mse, ema, a folder, none or auto; docs/data.md"
ALONE = ("digits", "preview")  # what is done by one process
# Where a command is called otherwise.
MODULES = {"latents": "caches", "signals": "examples", "digits_pairs": "examples"}
STORES = ("float32", "float16", "bfloat16")


def check_places(args):
    """Raises ValueError or OSError where the work could not be kept; before any is done."""
    files.check_arguments(vars(args))
    output = args.output or "-"
    if files.is_remote(output):
        if getattr(args, "overwrite", False):
            raise ValueError(f"--overwrite: names in a bucket cannot be changed: remove {output}")
        files.check_writable(files.path(output))


def run(args):
    """Runs the command, whose module brings what only it needs; what it made is drawn."""
    complete = importlib.import_module(
        f"scripts.prepare.{MODULES.get(args.command, args.command)}"
    ).run(args)
    if complete and args.preview:
        from scripts.prepare import preview

        preview.after(args)


def join_processes(args):
    """Settles `args.process_id` of `args.num_processes`, and starts over where that is asked for.

    Processes share the work without speaking to each other. Where a TPU slice wants all its hosts
    to be there, or `--overwrite` has to come before all else, they join jax.distributed.
    """
    if args.coordinator_address:
        import jax

        from utils import processes

        process = (args.coordinator_address, args.num_processes, args.process_id)
        if args.coordinator_address == "auto":
            process = (None, None, None)
        elif args.num_processes < 2:
            raise ValueError("--coordinator_address HOST:PORT needs --num_processes, 2 or more")
        # The first may have to wait long for the slowest.
        processes.join(*process, timeout=args.join_timeout, shutdown_timeout=DAY)
        args.process_id, args.num_processes = jax.process_index(), jax.process_count()
    if not 0 <= args.process_id < args.num_processes:
        raise ValueError(f"--process_id={args.process_id} is not below --num_processes")
    if not args.overwrite:
        return
    if args.num_processes > 1 and not args.coordinator_address:
        raise ValueError(
            "--overwrite with several processes needs --coordinator_address, so that they wait "
            f"for each other; or delete {args.output} first"
        )
    if args.process_id == 0:
        from scripts.prepare import shards

        shards.begin_overwriting(args.output)
    if args.num_processes > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("overwrite")


# Options ----------------------------------------------------------------------------------------


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("a number above 0")
    return int(text)


def _count(text):
    return 0 if text == "0" else _positive(text)


def _factor(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("a number above 0")
    return value


def _words(text):
    return tuple(text.split(","))


def _places(text):
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if not all(name.isidentifier() for name, _, _ in pairs):
        raise argparse.ArgumentTypeError("NAME=PLACE,NAME=PLACE, with plain names")
    return {name: place or name for name, _, place in pairs}


def _bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("True or False")
    return text.lower() == "true"


# How argparse takes each option; a command may have another default, or say more of it.
OPTIONS = {
    "input": {"required": True},
    "output": {"required": True, "help": "folder of the records"},
    "name": {"required": True, "help": "such as cifar10"},
    "data_dir": {"help": "where TFDS keeps its own sets; default: its default"},
    "root": {"required": True, "help": "folder of the records"},
    "split": {"help": "default: train"},
    "count": {"type": _positive, "default": 64},
    "classes": {"type": _words, "default": (), "help": "0,1,...; default: all ten"},
    "check": {"type": _bool, "default": True, "help": "whether it is whole and CIFAR-10's own"},
    "splits": {"type": _words, "default": (), "help": "train,val; default: all"},
    "num_classes": {"type": _positive, "help": "default: as the labels say"},
    "config_name": {"help": "of several sets in a repository, by its README"},
    "key": {"help": "array of the samples; default: values, image, ..."},
    "image_key": {"help": "column of the images; default: the one there is"},
    "label_key": {"help": "column of the labels; default: the one there is"},
    "labels": {"choices": ("auto", "folders", "none"), "default": "auto",
               "help": "auto: a list such as dataset.json, else the class folders"},
    "conditions": {"type": _places, "default": {}, "metavar": "NAME=PLACE,...",
                   "help": "more for each record: a folder, column, ending or array; "
                   "docs/conditions.md"},
    # Pictures.
    "image_size": {"type": _positive, "default": 256, "help": "pixels, after ADM's crop"},
    "vae": {"default": "mse", "help": "mse (default), ema, a folder, or none for pixels"},
    "flip": {"type": _bool, "default": False, "help": "latents of mirrored images too"},
    "background": {"choices": ("keep", "white", "black"), "default": "keep",
                   "help": "behind transparent pictures; keep: the colours stored there"},
    "on_bad_image": {"choices": ("fail", "skip"), "default": "fail"},
    "exif_orientation": {"type": _bool, "default": False, "help": "turn photos as EXIF says"},
    "compute_latent": {"type": _bool, "default": True, "help": "write the records"},
    "store": {"choices": STORES, "default": STORES[0], "help": "of latents"},
    "encoding": {"choices": ("raw", "webp", "png"), "default": "raw",
                 "help": "of pixels; lossless"},
    # Statistics.
    "device_batch_size": {"type": _positive, "default": 32},
    "compute_fid": {"type": _bool, "default": False, "help": "FID statistics too"},
    "fid_stats": {"help": "default: OUTPUT/NAME_fid_stats.npz"},
    "fid_resize": {"choices": ("half_pixel", "tf1"), "default": "half_pixel"},
    "inception_weights": {"help": "default: look for them"},
    # What arrays of latents hold.
    "layout": {"choices": ("auto", "nhwc", "nchw"), "default": "auto"},
    "content": {"choices": ("auto", "moments", "log_moments", "samples"), "default": "auto"},
    "scaled_by": {"type": _factor, "default": 1.0,
                  "help": "what latents were multiplied by: 0.18215"},
    # Work that can be shared.
    "records_per_shard": {"type": _positive, "default": 4096},
    "overwrite": {"type": _bool, "nargs": "?", "const": True, "default": False},
    "workers": {"type": _positive, "default": os.cpu_count(), "help": "threads"},
    "coordinator_address": {"help": "HOST:PORT, or auto; docs/data.md"},
    "num_processes": {"type": int, "default": 1, "help": "that share the work"},
    "process_id": {"type": int, "default": 0, "help": "of this one, from 0"},
    "join_timeout": {"type": _positive, "default": 300, "help": "seconds"},
    "preview": {"type": _count, "default": 64, "help": "records in OUTPUT/preview.png; 0: none"},
}  # fmt: skip
SHARED = "output records_per_shard overwrite workers coordinator_address num_processes process_id "
SHARED += "join_timeout preview"
FID = "device_batch_size compute_fid fid_stats fid_resize inception_weights"
PICTURES = "conditions splits image_size vae flip background on_bad_image exif_orientation "
PICTURES += "compute_latent store encoding num_classes"
FORM = "layout content scaled_by"
DECODES = {"default": "auto", "help": DECODER}


def _input(text):
    return {"input": {"help": text}}


# {command: (help, its options, what it has otherwise)}
COMMANDS = {
    "digits": ("the handwritten digits of scikit-learn", "output classes preview", {}),
    "digits_pairs": (
        "the digits with their upper halves, 4 x 4 pixels and names; docs/conditions.md",
        SHARED,
        {},
    ),
    "signals": ("days of electricity demand, from the package aeon", SHARED, {}),
    "images": (
        "a folder of images, or a .zip: in class folders, or with a list",
        f"input labels label_key {PICTURES} {FID} {SHARED}",
        _input("has train/CLASS/ and val/CLASS/, or CLASS/; docs/data.md"),
    ),
    "huggingface": (
        "an image set of Hugging Face on disk: parquet, save_to_disk",
        f"input image_key label_key config_name {PICTURES} {FID} {SHARED}",
        _input("a folder of .parquet or .arrow, or a file"),
    ),
    "webdataset": (
        "WebDataset's .tar shards of images, or of .npy latents",
        f"input label_key config_name {FORM} {PICTURES} {FID} {SHARED}",
        _input("a folder of .tar files, or a file")
        | {"vae": {"default": None}}
        | {"label_key": {"help": "of .json, or an ending; default: .cls, label of .json"}},
    ),
    "cifar10": (
        "CIFAR-10 from what there is on disk",
        f"input check {FID} {SHARED}",
        _input("an archive, or a folder of batches, downloads or pictures")
        | {"fid_resize": {"default": "tf1"}},
    ),
    "pt": (
        "a folder of published .pt latents",
        f"input num_classes store vae {SHARED}",
        _input("has train/*.pt and val/*.pt, or *.pt")
        | {"num_classes": {"type": int, "default": 1000, "help": None}, "vae": DECODES},
    ),
    "latents": (
        "the cache of latents of another project; docs/data.md",
        f"input labels label_key splits num_classes {FORM} store vae {SHARED}",
        _input("a folder, a .zip, .tar, LMDB, ... as it is")
        | {"scaled_by": {"default": None}, "vae": DECODES},
    ),
    "arrays": (
        "latents and labels in .npy and .npz files",
        f"input splits num_classes {FORM} conditions store vae {SHARED}",
        _input("a folder, or a file; docs/data.md") | {"vae": DECODES},
    ),
    "values": (
        "signals, fields, pairs in .npz, .npy or .parquet",
        f"input key label_key conditions layout store splits num_classes {SHARED}",
        _input("a folder, or a file; docs/conditions.md")
        | {
            "conditions": {
                "type": _words,
                "default": None,
                "metavar": "NAME,...",
                "help": "arrays beside; default: all others",
            }
        }
        | {
            "layout": {
                "choices": ("nhwc", "nchw", "nhw"),
                "default": "nhwc",
                "help": "where channels are: behind, before, or there is no axis of them",
            }
        }
        | {"store": {"choices": STORES[:2], "help": "of numbers"}},
    ),  # fmt: skip
    "tfds": (
        "an image set of TensorFlow Datasets by its name",
        f"name data_dir splits image_size background {SHARED}",
        {"image_size": {"type": int, "default": None, "help": "crop to it; default: as they are"}},
    ),
    "preview": (
        "draws records of a dataset that is there",
        "root output split vae count",
        {"output": {"required": False, "help": "the PNG; default: ROOT/preview.png"}}
        | {"vae": DECODES},
    ),
}


def parse(argv):
    parser = commands.parser("scripts.prepare_dataset", __doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (text, options, own) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text)
        for option in options.split():
            command.add_argument(f"--{option}", **OPTIONS[option] | own.get(option, {}))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        check_places(args)
        if args.command not in ALONE:
            join_processes(args)
        run(args)
    except (ValueError, OSError) as error:
        print(f"prepare_dataset: {files.line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_dataset: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main())
