"""How reading grows with a dataset: a small set stands in for one of up to a billion records."""

import dataclasses
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np

from utils import dataset, order
from utils.iterator import RecordIterator

COUNTS = (1_281_167, 14_000_000, 100_000_000, 1_000_000_000)


@dataclasses.dataclass(frozen=True)
class Repeated:
    """The records of a small set again and again, as if there were `num_records`."""

    records: Any
    num_records: int

    def read(self, indices, flipped):
        return self.records.read(indices % self.records.num_records, flipped)


def run(root, args):
    """Measures each number of records, as it is and with a permutation in memory.

    Returns:
      [{"records", "order", "start_s", "epoch_end_s", "latents_per_second", "mib"}].
    """
    cases = [(count, count > order.LARGE) for count in args.growth]
    # What it would be with the other order, as far as that is feasible.
    cases += [(count, False) for count in args.growth if order.LARGE < count <= args.largest_stored]
    rows = []
    for count, keyed in sorted(cases):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measured, (root, count, keyed, args)))
    print(
        f"{'records':>14} {'order':12} {'start':>9} {'epoch end':>10} {'latents/s':>10} {'MiB':>7}"
    )
    for row in rows:
        print(
            f"{row['records']:14,} {row['order']:12} {row['start_s']:7.2f} s "
            f"{row['epoch_end_s']:8.2f} s {row['latents_per_second']:10,.0f} {row['mib']:7,.0f}"
        )
    return rows


def measured(root, count, keyed, args):
    """One row, in a process of its own.

    `epoch_end_s` is the longest that a batch takes around an epoch's end, `mib` what the process
    grew by.
    """
    records = Repeated(dataset.open_records(root), count)
    before, begin = peak_memory(), time.perf_counter()
    batches = RecordIterator(
        records, args.batch_size, seed=0, num_workers=args.num_workers, prefetch=args.prefetch
    )
    place = {"position": 0, "seed": 0, "num_records": count, "keyed": keyed}
    batches.set_state(place)
    next(batches)
    start, read, begin = time.perf_counter() - begin, 0, time.perf_counter()
    while time.perf_counter() - begin < args.seconds:
        next(batches)
        read += args.batch_size
    rate = read / (time.perf_counter() - begin)
    batches.set_state(place | {"position": count - 20 * args.batch_size})
    waits = []
    for _ in range(40):
        begin = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begin)
    batches.close()
    return {
        "records": count, "order": "computed" if keyed else "in memory", "start_s": start,
        "epoch_end_s": float(np.max(waits[1:])), "latents_per_second": rate,
        "mib": peak_memory() - before,
    }  # fmt: skip


def peak_memory():
    """The largest resident memory of this process so far, in MiB."""
    # Not getrusage: its figure goes on from that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
