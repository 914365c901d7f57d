"""What the records of a dataset are: digests that tell one dataset from another.

Two are kept. `content` is over every record and is noted while they are written; `sample` is over
what is stored, and can be taken of any dataset, those of before included.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from utils import files, identity

WHOLE = 2**14  # records of a set that `sample` reads as a whole,
WHOLE_BYTES = 2**26  # where they are no more than this
SAMPLED = 2**10  # records that stand for a larger set


def note(path, content):
    """Keeps the sum `content` of a shard until the dataset is complete, to spare reading it."""
    files.write_text(_note(path), str(content))


def _note(path):
    path = files.path(path)
    return path.with_name(f"unfinished-content-{path.name}")


def of_shards(paths, read):
    """Digests the records of all shards; `read(path)` returns the records of one as bytes."""
    total = identity.Sum()
    for path in paths:
        try:
            total.join(identity.Sum(_note(path).read_text()))
        except (OSError, ValueError):  # not noted
            for record in read(path):
                total.add(record)
    return str(total)


def forget(root, name):
    """Removes the notes of a dataset that is complete."""
    for path in files.path(root).glob(f"unfinished-content-{name}-*"):
        path.unlink(missing_ok=True)


def of_records(records, description):
    """Identifies opened records: by what `description`, JSON, says of them, and a sample.

    Reads some of them.
    """
    count = records.num_records
    whole = count <= WHOLE and size_of(records) <= WHOLE_BYTES
    indices = np.arange(count) if whole else np.linspace(0, count - 1, SAMPLED).astype(np.int64)
    noted = {}
    try:
        noted = dict(json.loads(description))
        noted["content"] = noted["content"][records.split]
    except (ValueError, TypeError, KeyError):  # of before, or of other people
        noted.pop("content", None)
    batch = records.read(indices)
    wanted = {name: batch.pop(name) for name in records.wanted}
    more = {"conditions": identity.of_arrays(wanted, count)} if wanted else {}
    return noted | {"sample": identity.of_arrays(batch, count)} | more


def label_counts(records, num_classes, part=0, parts=1):
    """Returns the number of records of each class, int32 (num_classes,), in one of `parts`.

    Reads all records of the part.
    """
    mine = np.arange(part, records.num_records, parts)
    pieces = np.array_split(mine, len(mine) // SAMPLED + 1)

    def count(rows):
        labels = records.read(rows, flipped=False)["label"]
        return np.bincount(labels, minlength=num_classes)

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(count, pieces), np.zeros(num_classes, np.int32)).astype(np.int32)


def size_of(records):
    """Returns the bytes of all records, labels apart."""
    size = np.prod(records.shape) * records.dtype.itemsize * (1 + records.has_flipped)
    return int(records.num_records * size)
