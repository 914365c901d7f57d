"""Writes a dataset shard by shard: which there are, whose they are, what is missing.

The shards follow from the list of items alone, process p of P writes numbers p, p + P, ... of
them, and each appears under its name when complete. So the records do not depend on the number of
processes, and a run that was interrupted goes on with what is missing, under any number.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import dataset, files, processes

PLAN = "preparation.json"  # what the dataset in a folder is made of, from the first shard on
PREVIEW = "preview.png"  # a picture of the records, beside them
METADATA = ("features.json", "label.labels.txt", "dataset_info.json")  # the last makes the dataset
OVERHEAD = 64  # bytes of a record beside its tensors
NEW = "unfinished-overwrite"  # where one is made that is to take the place of another


class Job(NamedTuple):
    """What is to be written.

    items: {split: one entry per record, in order}; names: {split: [str]}, what identifies them.
    settings: JSON-able; what has to be equal for a run to go on with the shards of another.
    classes: names in the order of the labels, or their number.
    conditions: {name: (shape, dtype)} of what is stored beside.
    """

    output: Path
    records_per_shard: int
    key: str
    shape: tuple
    classes: Sequence | int
    items: dict
    names: dict
    settings: dict
    dtype: np.dtype = np.dtype(np.uint8)
    flipped: bool = False
    conditions: dict = {}


class Shard(NamedTuple):
    path: Path
    split: str
    start: int  # its items are [start, stop) of the split
    stop: int


def make(args, examples, **job):
    """Writes as `write` does the job of the options `args`, and of the other fields of a `Job`."""
    job = Job(files.path(args.output), args.records_per_shard, **job)
    return write(job, examples, args.process_id, args.num_processes, args.overwrite)


def shards(job):
    """Lists all shards of a job, in order."""
    listed = []
    for split, items in job.items.items():
        starts = range(0, len(items), job.records_per_shard)
        for i, start in enumerate(starts):
            path = dataset.shard_path(job.output, split, i, len(starts))
            listed.append(Shard(path, split, start, min(start + job.records_per_shard, len(items))))
    return listed


def write(job, examples, process_index=0, process_count=1, overwrite=False):
    """Writes this process's missing shards, and the metadata once all shards of all are there.

    With `overwrite` the dataset that is in the folder stays until the new one is complete.

    Args:
      examples: function: items -> iterable with, in their order, one example for each (see
        utils/dataset.py) or None where the item is left out.
    Returns whether the dataset is complete. Raises ValueError if the folder was begun with other
    settings, or holds something else.
    """
    if overwrite:
        new = job._replace(output=job.output / NEW)
        try:
            return write(new, examples, process_index, process_count) and _take_place(job.output)
        except FileNotFoundError:
            if new.output.exists() or not dataset.is_dataset(job.output):
                raise
            return True  # another process came to the end at the same time, and was faster
    _begin(job)
    every = shards(job)
    there = files.names(job.output)
    mine = [s for s in every[process_index::process_count] if s.path.name not in there]
    if not mine and dataset.is_dataset(job.output) and all(s.path.name in there for s in every):
        print(f"{job.output} is complete already; nothing to do", flush=True)
        return True
    for shard in mine:  # left by a run that was killed
        for path in job.output.glob(f"unfinished-{shard.path.name}-*"):
            path.unlink()
    items = [item for s in mine for item in job.items[s.split][s.start : s.stop]]
    _check_room(job, len(items))
    unit = "latents" if job.key == "moments" else "images"
    stream = iter(processes.progress(examples(items), len(items), unit))
    for shard in mine:
        part = itertools.islice(stream, shard.stop - shard.start)
        dataset.write_shard(shard.path, _those_there_are(part, shard))
    next(stream, None)  # lets the bar reach its end
    there = files.names(job.output)
    missing = sum(shard.path.name not in there for shard in every)
    if missing:
        print(f"{missing} of {len(every)} shards are left to other processes", flush=True)
        return False
    _finish(job, every)
    return True


def _check_room(job, count):
    """Raises OSError where the disk has no room for `count` records more."""
    tensors = [(job.shape, job.dtype)] * (2 if job.flipped else 1) + [*job.conditions.values()]
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in tensors)
    needed, free = count * (size + OVERHEAD), files.free(job.output)
    if needed > free:
        raise OSError(
            f"{job.output}: {needed:,} bytes are needed for {count:,} records, {free:,} are free; "
            "make room, take another --output, or --store=float16"
        )
    room = "" if files.is_remote(job.output) else f", {free:,} free"
    print(f"{count:,} records to write: {needed:,} bytes needed{room}", flush=True)


def _those_there_are(examples, shard):
    """Leaves out what is None; an end before the shard's is an error, not a short shard."""
    count = 0
    for example in examples:
        count += 1
        if example is not None:
            yield example
    if count != shard.stop - shard.start:
        raise ValueError(
            f"{shard.path.name}: {count} examples came for {shard.stop - shard.start} items"
        )


def begin_overwriting(output):
    """Makes the place for a dataset that `write` is to overwrite another with, empty."""
    for path in files.path(output).glob(f"{NEW}*"):
        shutil.rmtree(path, ignore_errors=True)


def _take_place(output):
    """Puts the dataset in `output`/NEW in the place of the one in `output`; returns True.

    Cut off at any point, the folder holds one plan and shards of no other, and no dataset that is
    not whole.
    """
    new = (output / NEW).rename(output / f"{NEW}-complete")
    remove(output)
    names = sorted(path.name for path in new.glob(f"{dataset.NAME}-*.array_record-*"))
    for name in (PLAN, *names, *METADATA):
        if (new / name).exists():
            os.replace(new / name, output / name)
    shutil.rmtree(new)
    print(f"it is in its place: {output}", flush=True)
    return True


def remove(output):
    """Deletes the dataset in a folder, finished or not, and nothing else; its plan last."""
    patterns = [
        *reversed(METADATA),
        f"{dataset.NAME}-*.array_record-*",
        "unfinished-*",
        PREVIEW,
        PLAN,
    ]
    for path in [entry for pattern in patterns for entry in output.glob(pattern)]:
        if path.is_file():
            path.unlink()


def _begin(job):
    """Makes the folder and notes what it is for, or checks that it is for the same."""
    plan = {
        **job.settings,
        "records_per_shard": job.records_per_shard,
        **{f"number of {split} items": len(names) for split, names in job.names.items()},
        **{f"names of {split} items": digest(names) for split, names in job.names.items()},
    }
    plan = json.loads(json.dumps(plan))
    path = job.output / PLAN
    if path.exists():
        before = json.loads(path.read_text())
        different = [
            f"{name}: {before.get(name)}, now {plan.get(name)}"
            for name in sorted({*before, *plan})
            if before.get(name) != plan.get(name) and not _same(name, before, plan)
        ]
        if different:
            raise ValueError(
                f"{job.output} was begun with other settings ({'; '.join(different)}): "
                "name another folder, or start over with --overwrite"
            )
    elif dataset.is_dataset(job.output):
        raise ValueError(f"{job.output} holds another dataset; name another folder")
    else:
        files.make_folder(job.output)
        files.write_text(path, json.dumps(plan, indent=2) + "\n")


def _same(name, before, plan):
    """Tells whether plans that differ in `name` are for the same records all the same.

    An autoencoder is its encoder, wherever it lies; plans of before do not tell the encoder.
    """
    if name == "encoder":
        return "encoder" not in before and "vae" in before and before["vae"] == plan.get("vae")
    if name == "arrays":  # before, .pt files said nothing of what they hold
        return "arrays" not in before and before.get("source") == "pt"
    return name == "vae" and "encoder" in plan and before.get("encoder") == plan["encoder"]


def _finish(job, every):
    lengths = {split: [] for split in job.items}
    for shard in every:
        lengths[shard.split].append(dataset.shard_length(shard.path))
    dataset.write_metadata(
        job.output,
        job.key,
        job.shape,
        job.dtype,
        job.classes,
        lengths,
        flipped=job.flipped,
        settings=job.settings,
        conditions=job.conditions,
    )
    counts = ", ".join(f"{sum(n)} records in {len(n)} shards ({s})" for s, n in lengths.items())
    print(f"{counts} -> {job.output}", flush=True)


def digest(names):
    """Digests a list of names in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
