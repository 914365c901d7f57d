"""Measures speed and memory of the data iterator.

    python -m benchmarks data [--num_records 100000] [--json FILE]

Makes synthetic latents in a temporary folder, as records in float32 and float16. Both are measured
in turn, several times, from the page cache.
"""

import multiprocessing
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
        folder = Path(folder)
        print("writing synthetic latents ...", file=sys.stderr)
        readers = {}
        for store in STORES:
            write_records(folder / store, args.num_records, args.latent_size, store)
            readers[store] = record_batches(folder / store, args)
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
    """Returns the iterator of the records in `root`."""
    return iterator.RecordIterator(
        dataset.open_records(root),
        args.batch_size,
        seed=0,
        num_workers=args.num_workers,
        prefetch=args.prefetch,
    )


def epoch_apart(root, args):
    """Reads a whole epoch in a process of its own: its rate, and its memory by the way (MiB)."""
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


def peak_memory():
    """Returns the largest resident memory of this process so far, in MiB."""
    # Not getrusage: its figure goes on from that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


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
        print(f"{store:20} {epoch['latents_per_second']:20,.0f} {memory:>45}")


def latents(count, size, seed=0):
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
