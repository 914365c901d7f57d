"""Makes the datasets that training reads (docs/data.md).

python -m scripts.prepare_dataset digits --output DIR
python -m scripts.prepare_dataset images --input IMAGENET --output DIR --image_size 256
python -m scripts.prepare_dataset pt --input FOLDER_OF_PT_FILES --output DIR
python -m scripts.prepare_dataset latents --input CACHE_OF_ANOTHER_PROJECT --output DIR
python -m scripts.prepare_dataset arrays --input FOLDER_OF_NPY_OR_NPZ --output DIR
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

from utils import files, signals

DAY = 24 * 3600  # seconds
DECODER = "draws the preview: mse, ema, a folder, none or auto; docs/data.md"
ALONE = ("digits", "preview")  # what is done by one process
MODULES = {"latents": "caches"}  # where a command is called otherwise
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

        given = (args.coordinator_address, args.num_processes, args.process_id)
        if args.coordinator_address == "auto":
            given = (None, None, None)
        elif args.num_processes < 2:
            raise ValueError("--coordinator_address HOST:PORT needs --num_processes, 2 or more")
        # The first may have to wait long for the slowest.
        processes.join(*given, timeout=args.join_timeout, shutdown_timeout=DAY)
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


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.prepare_dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_subparsers(dest="command", required=True).add_parser
    digits = add("digits", help="the handwritten digits of scikit-learn")
    digits.add_argument("--output", required=True, help="folder to make")
    digits.add_argument("--classes", type=_words, default=(), help="0,1,...; default: all ten")
    _add_preview(digits)
    _add_images(add)
    _add_latents(add)
    _add_named(add)
    preview = add("preview", help="draws records of a dataset that is there")
    preview.add_argument("--root", required=True, help="folder of the records")
    preview.add_argument("--output", help="the PNG; default: ROOT/preview.png")
    preview.add_argument("--split", help="default: train")
    preview.add_argument("--vae", default="auto", help=DECODER)
    preview.add_argument("--count", type=_positive, default=64)
    return parser.parse_args(argv)


def _add_images(add):
    """Adds the commands that encode images, or store their pixels."""
    folders = add("images", help="a folder of images, or a .zip: in class folders, or with a list")
    folders.add_argument(
        "--input", required=True, help="has train/CLASS/ and val/CLASS/, or CLASS/; docs/data.md"
    )
    tables = add("huggingface", help="an image set of Hugging Face on disk: parquet, save_to_disk")
    tables.add_argument("--input", required=True, help="a folder of .parquet or .arrow, or a file")
    tables.add_argument("--image_key", help="column of the images; default: the one there is")
    tables.add_argument("--label_key", help="column of the labels; default: the one there is")
    tars = add("webdataset", help="WebDataset's .tar shards of images, or of .npy latents")
    tars.add_argument("--input", required=True, help="a folder of .tar files, or a file")
    tars.add_argument("--label_key", help="of .json, or an ending; default: .cls, label of .json")
    cifar10 = add("cifar10", help="CIFAR-10 from what there is on disk")
    cifar10.add_argument(
        "--input", required=True, help="an archive, or a folder of batches, downloads or pictures"
    )
    cifar10.add_argument(
        "--check", type=_bool, default=True, help="whether it is whole and CIFAR-10's own"
    )
    for command in (folders, tables, tars):
        _add_conditions(command)
        command.add_argument("--splits", type=_words, default=(), help="train,val; default: all")
        command.add_argument(
            "--image_size", type=_positive, default=256, help="pixels, after ADM's crop"
        )
        command.add_argument(
            "--vae",
            default=None if command is tars else "mse",
            help="mse (default), ema, a folder, or none for pixels",
        )
        command.add_argument(
            "--flip", type=_bool, default=False, help="latents of mirrored images too"
        )
        _add_background(command)
        command.add_argument("--on_bad_image", choices=("fail", "skip"), default="fail")
        command.add_argument(
            "--exif_orientation", type=_bool, default=False, help="turn photos as EXIF says"
        )
        command.add_argument("--compute_latent", type=_bool, default=True, help="write the records")
        command.add_argument("--store", choices=STORES, default=STORES[0], help="of latents")
        command.add_argument(
            "--encoding", choices=("raw", "webp", "png"), default="raw", help="of pixels; lossless"
        )
    for command in (folders, tables, tars):
        command.add_argument("--num_classes", type=_positive, help="default: as the labels say")
    for command in (tables, tars):
        command.add_argument("--config_name", help="of several sets in a repository, by its README")
    _add_labels(folders)
    _add_form(tars)
    for command, resize in zip(
        (folders, tables, tars, cifar10), ("half_pixel",) * 3 + ("tf1",), strict=True
    ):
        command.add_argument("--device_batch_size", type=_positive, default=32)
        command.add_argument("--compute_fid", type=_bool, default=False, help="FID statistics too")
        command.add_argument("--fid_stats", help="default: OUTPUT/NAME_fid_stats.npz")
        command.add_argument("--fid_resize", choices=("half_pixel", "tf1"), default=resize)
        command.add_argument("--inception_weights", help="default: look for them")
        _add_shared(command)


def _add_latents(add):
    """Adds the commands that store latents."""
    files = add("pt", help="a folder of published .pt latents")
    files.add_argument("--input", required=True, help="has train/*.pt and val/*.pt, or *.pt")
    files.add_argument("--num_classes", type=int, default=1000)
    caches = add("latents", help="the cache of latents of another project; docs/data.md")
    caches.add_argument("--input", required=True, help="a folder, a .zip, .tar, LMDB, ... as it is")
    _add_labels(caches)
    arrays = add("arrays", help="latents and labels in .npy and .npz files")
    arrays.add_argument("--input", required=True, help="a folder, or a file; docs/data.md")
    for command in (caches, arrays):
        command.add_argument("--splits", type=_words, default=(), help="train,val; default: all")
        command.add_argument("--num_classes", type=_positive, help="default: as the labels say")
    _add_form(arrays)
    _add_conditions(arrays)
    _add_form(caches, None)
    for command in (files, caches, arrays):
        command.add_argument("--store", choices=STORES, default=STORES[0], help="of latents")
        command.add_argument("--vae", default="auto", help=DECODER)
        _add_shared(command)


def _add_conditions(command):
    command.add_argument(
        "--conditions", type=_places, default={}, metavar="NAME=PLACE,...",
        help="more for each record: a folder, column, ending or array; docs/conditions.md",
    )  # fmt: skip


def _add_form(command, scaled_by=1.0):
    """Adds the options of what arrays of latents hold."""
    command.add_argument("--layout", choices=("auto", "nhwc", "nchw"), default="auto")
    contents = ("auto", "moments", "log_moments", "samples")
    command.add_argument("--content", choices=contents, default="auto")
    command.add_argument(
        "--scaled_by",
        type=_factor,
        default=scaled_by,
        help="what latents were multiplied by: 0.18215",
    )


def _add_named(add):
    named = add("tfds", help="an image set of TensorFlow Datasets by its name")
    named.add_argument("--name", required=True, help="such as cifar10")
    named.add_argument("--data_dir", help="where TFDS keeps its own sets; default: its default")
    named.add_argument("--splits", type=_words, default=(), help="default: all there are")
    named.add_argument("--image_size", type=int, help="crop to this; default: as they are")
    _add_background(named)
    _add_shared(named)


def _add_background(command):
    command.add_argument(
        "--background", choices=("keep", "white", "black"), default="keep",
        help="behind transparent pictures; keep: the colours stored there",
    )  # fmt: skip


def _add_labels(command):
    """Adds the options of where labels are from."""
    command.add_argument(
        "--labels", choices=("auto", "folders", "none"), default="auto",
        help="auto: a list such as dataset.json, else the class folders",
    )  # fmt: skip
    command.add_argument("--label_key", help="column of the list; default: the one there is")


def _add_shared(command):
    """Adds the options of all commands whose work can be shared."""
    command.add_argument("--output", required=True, help="folder of the records")
    command.add_argument("--records_per_shard", type=_positive, default=4096)
    command.add_argument("--overwrite", type=_bool, nargs="?", const=True, default=False)
    command.add_argument("--workers", type=_positive, default=os.cpu_count(), help="threads")
    command.add_argument("--coordinator_address", help="HOST:PORT, or auto; docs/data.md")
    command.add_argument("--num_processes", type=int, default=1, help="that share the work")
    command.add_argument("--process_id", type=int, default=0, help="of this one, from 0")
    command.add_argument("--join_timeout", type=_positive, default=300, help="seconds")
    _add_preview(command)


def _add_preview(command):
    command.add_argument(
        "--preview", type=_count, default=64, help="records in OUTPUT/preview.png; 0: none"
    )


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


def main(argv=None):
    args = parse(argv)
    try:
        check_places(args)
        if args.command not in ALONE:
            join_processes(args)
        run(args)
    except (ValueError, OSError) as error:
        print(f"prepare_dataset: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_dataset: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main())
