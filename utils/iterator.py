"""The iterator over shuffled batches that training uses."""

import contextlib

import grain
import numpy as np

from utils import order, train_metrics
from utils.order import shuffled_indices


class RecordIterator:
    """Endless shuffled batches, read ahead in the background; resumes anywhere at once.

    Draw number k of the whole run is record `permutation_{k div n}(k mod n)`: every record once
    per epoch, another order each epoch, determined by `seed` alone (utils/order.py). Batch i is
    draws `[i B, (i + 1) B)`, across epoch borders, and process p of P gets its rows
    `[p B/P, (p + 1) B/P)`. So neither the number of processes nor of threads changes the data,
    and the place is one number.

    Args:
      records: from `utils.dataset.open_records`.
      batch_size: of all processes together.
      seed: in [0, 2**32).
      num_workers: threads that read batches; 0 reads in `next` itself.
      prefetch: batches held ready, which bounds the memory.
      flipped: whether to read `moments_flipped` where the records have it.
    """

    def __init__(
        self,
        records,
        batch_size,
        seed,
        process_index=0,
        process_count=1,
        num_workers=2,
        prefetch=4,
        flipped=True,
    ):
        if batch_size % process_count:
            raise ValueError(
                f"training.batch_size {batch_size} is not divisible by {process_count} processes"
            )
        self._records, self._seed, self._flipped = records, seed, flipped
        self._batch_size, self._local_size = batch_size, batch_size // process_count
        self._row = process_index * self._local_size
        self._keyed = records.num_records > order.LARGE
        self._options = grain.ReadOptions(num_workers, max(prefetch, num_workers))
        self._batches = self._error = None
        self._start(0)

    def _start(self, position):
        """Reads from draw number `position` on; drops what was read ahead."""
        self.close()
        self._position = position
        self._error = None
        batches = grain.MapDataset.range(2**62).map(lambda i: self._read(position, i))
        self._batches = iter(batches.to_iter_dataset(self._options))

    def _read(self, position, i):
        start = position + i * self._batch_size + self._row
        stop = start + self._local_size
        return self._records.read(self._draws(start, stop), self._flipped)

    def _draws(self, start, stop):
        """Returns the numbers of the records of draws [start, stop)."""
        count = self._records.num_records
        return shuffled_indices(start, stop, count, self._seed, self._keyed)

    @contextlib.contextmanager
    def blaming(self, step):
        """Adds to a NotFiniteError what the batch of its step held; `step` steps are done now."""
        begin = self._position
        try:
            yield
        except train_metrics.NotFiniteError as error:
            blamed = self._blame(begin + (error.step - 1 - step) * self._batch_size)
            raise FloatingPointError(f"{error}. {blamed}") from error

    def _blame(self, start):
        """Says whether the batch of all processes from draw `start` on is finite, or who is not."""
        indices = self._draws(start, start + self._batch_size)
        bad = np.zeros(len(indices), bool)
        for value in self._records.read(indices, self._flipped).values():
            bad |= ~np.isfinite(value.astype(np.float32)).reshape(len(indices), -1).all(axis=1)
        numbers = sorted({int(i) for i in indices[bad]})
        if not numbers:
            return "The batch itself is finite"
        more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
        shown = ", ".join(map(str, numbers[:10]))
        return f"The batch itself holds them: records {shown}{more} of {self._records.root}"

    def __iter__(self):
        return self

    def __next__(self):
        if self._error is not None:  # a batch is never passed over silently
            raise self._error
        try:
            batch = next(self._batches)
        except Exception as error:
            self._error = error
            raise
        self._position += self._batch_size
        return batch

    def get_state(self):
        """Returns the place: the number of records drawn by all processes, and what fixes them."""
        count = self._records.num_records
        place = {"position": self._position, "seed": self._seed, "num_records": count}
        return place | ({"keyed": True} if self._keyed else {})

    def set_state(self, state):
        """Goes on at a place from `get_state`, under any process count and batch size.

        Raises ValueError if it belongs to another dataset or seed.
        """
        here = self.get_state()
        for name in ("seed", "num_records"):
            if state[name] != here[name]:
                raise ValueError(
                    f"cannot go on in the data of {self._records.root}: the saved place is for "
                    f"{name} {state[name]}, here it is {here[name]}"
                )
        self._keyed = bool(state.get("keyed", False))  # as the run began
        self._start(int(state["position"]))

    def close(self):
        """Ends the background threads."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
