"""Measures speed of the data iterator.

    python -m benchmarks data [--num_records 100000] [--json FILE]

Makes synthetic latents in a temporary folder, as records in float32 and float16. Both are measured
in turn, several times, from the page cache.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from utils import dataset, iterator

RECORDS_PER_SHARD = 4096
STORES = ("float32", "float16")


def add_arguments(parser):
    """Adds the options of `run`."""
    parser.add_argument("--num_records", type=int, default=16384, help="size of the synthetic set")
    parser.add_argument("--latent_size", type=int, default=32, help="side, with 2 x 4 channels")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=2, help="threads that read")
    parser.add_argument("--prefetch", type=int, default=4, help="batches read ahead")
    parser.add_argument("--rounds", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--seconds", type=float, default=3, help="least length of a measurement")
    parser.add_argument("--folder", help="where to put the temporary data; default: the system's")


def run(args):
    """Makes the data, measures, prints a table; returns the results as a dict."""
    if args.num_records < args.batch_size:
        raise ValueError(
            f"--num_records={args.num_records} is less than a batch of {args.batch_size}"
        )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print("writing synthetic latents ...", file=sys.stderr)
        readers, rates = {}, {store: [] for store in STORES}
        for store in STORES:
            root = Path(folder, store)
            write_records(root, args.num_records, args.latent_size, store)
            readers[store] = iterator.RecordIterator(
                dataset.open_records(root), args.batch_size, seed=0,
                num_workers=args.num_workers, prefetch=args.prefetch,
            )  # fmt: skip
            next(readers[store])
        for _ in range(args.rounds):
            for store, batches in readers.items():
                rates[store].append(measure(batches, args.batch_size, args.seconds))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, batch {args.batch_size}, shuffled: latents/s (median, lowest, highest)")
    medians = {store: float(np.median(of)) for store, of in rates.items()}
    for store, of in rates.items():
        print(f"{store:20} {medians[store]:10,.0f} {min(of):10,.0f} {max(of):10,.0f}")
    return {"cores": cores, "latents_per_second": medians, "measured": rates}


def measure(batches, batch_size, seconds):
    """Returns latents per second of an endless iterator, over at least `seconds`."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += batch_size
    return count / elapsed


def latents(count, size, seed):
    """Yields `count` pairs of moments float32 (size, size, 8) and a label.

    The values do not compress and lie in the range of ImageNet's.
    """
    rng = np.random.default_rng(seed)
    for i in range(count):
        moments = rng.standard_normal((size, size, 8), np.float32)
        moments[..., :4] *= 5
        moments[..., 4:] = np.abs(moments[..., 4:]) * 0.05
        yield moments, i % 1000


def write_records(root, count, size, store):
    """Writes a dataset of `count` latents of the type `store` into `root`."""
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
