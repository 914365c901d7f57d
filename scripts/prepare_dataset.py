"""Makes the datasets that training reads (docs/data.md).

python -m scripts.prepare_dataset digits --output DIR
python -m scripts.prepare_dataset images --input IMAGENET --output DIR --image_size 256
python -m scripts.prepare_dataset pt --input FOLDER_OF_PT_FILES --output DIR
python -m scripts.prepare_dataset cifar10 --input cifar-10-python.tar.gz --output DIR
python -m scripts.prepare_dataset tfds --name oxford_flowers102 --image_size 64 --output DIR
"""

import argparse
import importlib
import os
import sys

from utils import signals

DAY = 24 * 3600  # seconds
STORES = ("float32", "float16", "bfloat16")


def run(args):
    """Runs the command, whose module brings what only it needs."""
    importlib.import_module(f"scripts.prepare.{args.command}").run(args)


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
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="the handwritten digits of scikit-learn")
    digits.add_argument("--output", required=True, help="folder to make")
    digits.add_argument("--classes", type=_words, default=(), help="0,1,...; default: all ten")

    images = commands.add_parser("images", help="a folder of images with class subfolders")
    images.add_argument("--input", required=True, help="has train/CLASS/ and val/CLASS/, or CLASS/")
    images.add_argument("--splits", type=_words, default=(), help="train,val; default: all there")
    images.add_argument(
        "--image_size", type=_positive, default=256, help="pixels, after ADM's crop"
    )
    images.add_argument("--vae", default="mse", help="mse, ema, a folder, or none for pixels")
    images.add_argument("--flip", type=_bool, default=False, help="latents of mirrored images too")
    images.add_argument("--on_bad_image", choices=("fail", "skip"), default="fail")
    images.add_argument(
        "--exif_orientation", type=_bool, default=False, help="turn photos as EXIF says"
    )
    images.add_argument("--compute_latent", type=_bool, default=True, help="write the records")

    cifar10 = commands.add_parser("cifar10", help="CIFAR-10 from what there is on disk")
    cifar10.add_argument(
        "--input", required=True, help="an archive, or a folder of batches, downloads or pictures"
    )
    cifar10.add_argument(
        "--check", type=_bool, default=True, help="whether it is whole and CIFAR-10's own"
    )
    for command, resize in ((images, "half_pixel"), (cifar10, "tf1")):
        command.add_argument("--device_batch_size", type=_positive, default=32)
        command.add_argument("--compute_fid", type=_bool, default=False, help="FID statistics too")
        command.add_argument("--fid_stats", help="default: OUTPUT/NAME_fid_stats.npz")
        command.add_argument("--fid_resize", choices=("half_pixel", "tf1"), default=resize)
        command.add_argument("--inception_weights", help="default: look for them")

    latents = commands.add_parser("pt", help="a folder of published .pt latents")
    latents.add_argument("--input", required=True, help="has train/*.pt and val/*.pt, or *.pt")
    latents.add_argument("--num_classes", type=int, default=1000)

    named = commands.add_parser("tfds", help="an image set of TensorFlow Datasets by its name")
    named.add_argument("--name", required=True, help="such as cifar10")
    named.add_argument("--data_dir", help="where TFDS keeps its own sets; default: its default")
    named.add_argument("--splits", type=_words, default=(), help="default: all there are")
    named.add_argument("--image_size", type=int, help="crop to this; default: as they are")

    for command in (images, latents):
        command.add_argument("--store", choices=STORES, default=STORES[0], help="of latents")
    for command in (images, cifar10, latents, named):
        _add_shared(command)
    return parser.parse_args(argv)


def _add_shared(command):
    """What all commands have whose work can be shared."""
    command.add_argument("--output", required=True, help="folder of the records")
    command.add_argument("--records_per_shard", type=_positive, default=4096)
    command.add_argument("--overwrite", type=_bool, nargs="?", const=True, default=False)
    command.add_argument("--workers", type=_positive, default=os.cpu_count(), help="threads")
    command.add_argument("--coordinator_address", help="HOST:PORT, or auto; docs/data.md")
    command.add_argument("--num_processes", type=int, default=1, help="that share the work")
    command.add_argument("--process_id", type=int, default=0, help="of this one, from 0")
    command.add_argument("--join_timeout", type=_positive, default=300, help="seconds")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("a number above 0")
    return int(text)


def _words(text):
    return tuple(text.split(","))


def _bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("True or False")
    return text.lower() == "true"


def main(argv=None):
    args = parse(argv)
    try:
        if args.command != "digits":
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
