"""Speed and memory of the data iterator, beside a plain reader of one file per latent.

    python -m benchmarks data [--num_records 100000] [--json FILE]

Makes synthetic latents in a temporary folder: as records in float32 and float16, and as the `.pt`
files of the published code, which are read in a shuffled order by a pool of threads, one
`torch_files.load` each. All three are measured in turn, several times, from the page cache.
"""

import concurrent.futures
import multiprocessing
import os
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from benchmarks import growth
from benchmarks.growth import peak_memory
from formats import torch_files
from utils import dataset, iterator

RECORDS_PER_SHARD = 4096
STORES = ("float32", "float16")


def add_arguments(parser):
    """The options of `run`."""
    parser.add_argument("--num_records", type=int, default=16384, help="size of the synthetic set")
    parser.add_argument("--pt_files", type=int, default=16384, help="as .pt files; 0: none")
    parser.add_argument("--latent_size", type=int, default=32, help="side, with 2 x 4 channels")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=2, help="threads, of either reader")
    parser.add_argument("--prefetch", type=int, default=4, help="batches read ahead")
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--seconds", type=float, default=3, help="least length of a measurement")
    parser.add_argument("--growth", type=int, nargs="*", help="instead: how it grows with these "
                        "numbers of records; without numbers up to a billion")  # fmt: skip
    parser.add_argument("--largest_stored", type=int, default=100_000_000, help="of --growth: up "
                        "to how many records also with a permutation in memory")  # fmt: skip
    parser.add_argument("--folder", help="where to put the temporary data; default: the system's")


def run(args):
    """Makes the data, measures, prints a table; returns the results as a dict."""
    if args.num_records < args.batch_size:
        raise ValueError(
            f"--num_records={args.num_records} is less than a batch of {args.batch_size}"
        )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        print("writing synthetic latents ...", file=sys.stderr)
        if args.growth is not None:
            write_records(folder / "small", args.num_records, args.latent_size, "float32")
            args.growth = args.growth or growth.COUNTS
            return {"growth": growth.run(folder / "small", args)}
        readers = {}
        for store in STORES:
            write_records(folder / store, args.num_records, args.latent_size, store)
            readers[f"records, {store}"] = record_batches(folder / store, args)
        if args.pt_files:
            write_pt_files(folder / "pt", args.pt_files, args.latent_size)
            readers[".pt files"] = pt_batches(folder / "pt", args)
        rates = {name: [] for name in readers}
        for batches in readers.values():
            next(batches)
        for _ in range(args.rounds):
            for name, batches in readers.items():
                rates[name].append(measure(batches, args.batch_size, args.seconds))
        results = {
            "cores": len(os.sched_getaffinity(0)),
            "latents_per_second": {n: float(np.median(rate)) for n, rate in rates.items()},
            "range": {n: [min(rate), max(rate)] for n, rate in rates.items()},
            "epoch": {store: epoch_apart(folder / store, args) for store in STORES},
            "options": {k: v for k, v in vars(args).items() if isinstance(v, (int, float))},
        }
    report(results)
    return results


def measure(batches, batch_size, seconds):
    """Latents per second of an endless iterator, over at least `seconds`."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += batch_size
    return count / elapsed


def record_batches(root, args):
    """The project's iterator."""
    return iterator.RecordIterator(
        dataset.open_records(root),
        args.batch_size,
        seed=0,
        num_workers=args.num_workers,
        prefetch=args.prefetch,
    )


def pt_batches(folder, args):
    """Shuffled batches of `.pt` files, `num_workers` threads, as many batches ahead."""
    paths = sorted(folder.iterdir())
    rng = np.random.default_rng(0)

    def load(chosen):
        contents = [torch_files.load(path) for path in chosen]
        moments = np.stack([content["image"] for content in contents]).transpose(0, 2, 3, 1)
        return {
            "moments": np.ascontiguousarray(moments),
            "label": np.array([content["label"] for content in contents], np.int32),
        }

    def draw():
        return pool.submit(load, [paths[i] for i in rng.integers(len(paths), size=args.batch_size)])

    with concurrent.futures.ThreadPoolExecutor(args.num_workers) as pool:
        waiting = [draw() for _ in range(args.prefetch)]
        while True:
            waiting.append(draw())
            yield waiting.pop(0).result()


def epoch_apart(root, args):
    """A whole epoch in a process of its own: its rate, and its memory along the way (MiB)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_epoch, (root, args))


def _epoch(root, args):
    batches = record_batches(root, args)
    steps = args.num_records // args.batch_size
    memory, start = [], time.perf_counter()
    for step in range(steps):
        next(batches)
        if step % max(steps // 10, 1) == 0:
            memory.append(peak_memory())
    rate = steps * args.batch_size / (time.perf_counter() - start)
    batches.close()
    return {"latents_per_second": rate, "peak_mib": peak_memory(), "peak_mib_by_tenth": memory}


def report(results):
    """Prints the results as a table."""
    print(f"{results['cores']} cores, batch {results['options']['batch_size']}, shuffled")
    print(f"{'':20} {'latents/s (median)':>20} {'lowest':>10} {'highest':>10}")
    for name, rate in results["latents_per_second"].items():
        low, high = results["range"][name]
        print(f"{name:20} {rate:20,.0f} {low:10,.0f} {high:10,.0f}")
    count = results["options"]["num_records"]
    print(f"\na whole epoch of {count:,} latents, in a process of its own")
    print(f"{'':20} {'latents/s':>20} {'peak memory after a tenth, at the end (MiB)':>45}")
    for store, epoch in results["epoch"].items():
        early = epoch["peak_mib_by_tenth"][min(1, len(epoch["peak_mib_by_tenth"]) - 1)]
        memory = f"{early:,.0f}, {epoch['peak_mib']:,.0f}"
        print(f"{f'records, {store}':20} {epoch['latents_per_second']:20,.0f} {memory:>45}")


# The synthetic data: values that do not compress, in the range of ImageNet's


def latents(count, size, seed=0):
    """`count` pairs of moments float32 (size, size, 8) and a label."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        moments = rng.standard_normal((size, size, 8), np.float32)
        moments[..., :4] *= 5
        moments[..., 4:] = np.abs(moments[..., 4:]) * 0.05
        yield moments, i % 1000


def write_records(root, count, size, store):
    """A dataset of `count` latents in the given precision."""
    root.mkdir()
    starts = range(0, count, RECORDS_PER_SHARD)
    lengths = [min(RECORDS_PER_SHARD, count - start) for start in starts]
    for i, length in enumerate(lengths):
        examples = (
            {"moments": moments.astype(store), "label": label}
            for moments, label in latents(length, size, seed=i)
        )
        dataset.write_shard(dataset.shard_path(root, "train", i, len(lengths)), examples)
    shape = (size, size, 8)
    dataset.write_metadata(root, "moments", shape, np.dtype(store), 1000, {"train": lengths})


def write_pt_files(folder, count, size):
    """Files as `torch.save({"image": tensor (8, size, size), "label": int})` makes them."""
    folder.mkdir()
    for i, (moments, label) in enumerate(latents(count, size)):
        with zipfile.ZipFile(folder / f"{i:08d}.pt", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", _pickle((8, size, size), label))
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", moments.transpose(2, 0, 1).tobytes())
            archive.writestr("archive/version", "3\n")


def _pickle(shape, label):
    """The pickle in such a file, opcode by opcode, since torch is not at hand to make it."""

    def text(word):
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    def integer(value):
        return b"J" + struct.pack("<i", value)

    def integers(values):
        return b"(" + b"".join(integer(value) for value in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += integer(int(np.prod(shape))) + b"tQ"  # Q: a persistent id, the storage
    strides = (shape[1] * shape[2], shape[2], 1)
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage + integer(0) + integers(shape) + integers(strides) + b"\x89" + hooks
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    return b"\x80\x02}(" + text("image") + tensor + text("label") + integer(label) + b"u."
