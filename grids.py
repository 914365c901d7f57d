"""The pictures of a run while it trains: samples by class, steps and guidance, and real images.

`real.png` shows records of the classes of the grid, decoded, once in a run: what a network is to
come near to, and whether scale, channels and labels are right. `grid_STEP.png` has a row for each
class; where conditions come with the data, by those of the real images. `steps_STEP.png` has a row
for each of `training.sample_steps`, of the same noise, and where guidance is an input of the
network, `guidance_STEP.png` has one for each of a few scales; conditions that are arrays stand
above these rows, and the truth below.
"""

import functools

import jax
import numpy as np

import sample
from methods import objective
from methods.sampler import sample_times
from run import layout
from utils import files, order, processes, views
from utils import images as image_utils

SCALES = 4  # rows by guidance
SEARCHED = 4_000  # records, at most, that each process reads to find some of each class
SEARCHED_BYTES = 2**28
CHUNK = 500  # records that are read at a time


class Grids:
    """Draws the pictures, into WORKDIR/samples and into the log.

    Args:
      options: the options `sampling`.
      steps: numbers of steps, the options `training.sample_steps`.
      workdir: folder of the run.
      parts: `parts.Parts`.
      renderer: `sample.Renderer`.
      records: those that are shown as real images, and whose conditions the samples are drawn by.
      source: `utils.conditions.Source`, or None.
    """

    def __init__(self, options, steps, workdir, parts, renderer, records, source=None):
        self.folder, self.parts, self.records = workdir / layout.SAMPLES, parts, records
        self.renderer, self.source = renderer, source
        self.first, self.times = sample.settings(options)[0], sample.times_of(options)
        self.labels = sample.grid_labels(parts.num_classes)
        columns = np.arange(sample.GRID_COLUMNS)
        rows = len(self.labels) // len(columns)
        self.places = columns % rows * len(columns) + columns // rows  # of a row, in the grid
        self.steps = tuple(steps)
        self.scales = scales(parts.method)
        interval = options.t_min[0], options.t_max[0]
        self.guidances = [
            objective.Guidance(*map(np.float32, (scale, *interval)), np.int32(options.channels))
            for scale in self.scales
        ]

    def describe(self):
        """Says in a line what is drawn."""
        rows = ["by class"]
        if self.steps:
            rows.append(f"of the same noise by steps {', '.join(map(str, self.steps))}")
        if self.scales:
            rows.append(f"by guidance {', '.join(f'{scale:.3g}' for scale in self.scales)}")
        return f"rows {'; '.join(rows)}: {self.folder}"

    def path(self, step, name="grid", suffix=""):
        """Returns the path of a picture."""
        return self.folder / f"{name}_{step:08d}{suffix}.png"

    def draw(self, step, params, writer):
        """Draws all pictures of the weights `params`; that of the classes last, which says so."""
        first, most = self.first, max(self.steps, default=1)
        by_steps = [
            first.replace(times=padded(sample_times(steps), most, first.sampler))
            for steps in self.steps
        ]
        times = padded(first.times, most, first.sampler)
        by_guidance = [first.replace(times=times, guidance=g) for g in self.guidances]
        for name, settings in (("steps", by_steps), ("guidance", by_guidance)):
            if settings:
                self._save(step, writer, name, self._rows(params, settings))
        for i, times in reversed(list(enumerate(self.times))):
            setting = first.replace(times=times)
            given = self._given(np.arange(len(self.labels)))
            picture = sample.grid(self.renderer, params, self.labels, setting, given)
            self._save(step, writer, "grid", picture, f"_{len(times) - 1}step" if i else "")

    def draw_real(self, step, writer):
        """Draws the real images, where the run has no picture of them. Returns whether it did."""
        file = self.folder / layout.REAL
        if processes.from_writer(file.exists()):
            return False
        batch, filled = self._real
        images = views.truth(self.renderer, batch)
        images[~filled] = 0
        picture = sample.picture(images, sample.GRID_COLUMNS)
        writer.image(step, "real", picture)
        self._write(file, picture)
        return True

    @functools.cached_property
    def _real(self):
        """Reads records of the classes of the grid, see `of_classes`."""
        return of_classes(self.records, self.labels, bool(self.parts.num_classes))

    def _conditions(self, places):
        """Returns the raw conditions of images at places of the grid, int (n,); None for none."""
        if self.source is None:
            return None
        if self.source.records is None:
            return self.source(places)
        return {name: array[places] for name, array in self._real[0].items()}

    def _given(self, places):
        """Makes what the renderer takes for them, see `sample.given_by`."""
        if (batch := self._conditions(places)) is None:
            return None
        given = jax.device_get(self.parts.codec.conditions_of(batch))
        return lambda index: jax.tree.map(lambda rows: rows[index], given)

    def _rows(self, params, settings):
        """Draws a row of the same noise and labels for each `sample.Setting`.

        Where conditions come with the data, arrays among them stand above and the truth below.
        """
        labels, given = self.labels[self.places], self._given(self.places)
        rows = [images for s in settings for images in self.renderer(params, labels, s, given)]
        batch = self._conditions(self.places)
        if batch is not None and self.source.records:
            rows.append(views.truth(self.renderer, batch))
        rows = image_utils.shown(np.concatenate(rows))  # on one scale
        if batch is not None:
            above = views.conditions(self.renderer, batch, rows.shape[1:])
            rows = np.concatenate([*above.values(), rows])
        return sample.picture(rows, len(labels))

    def _save(self, step, writer, name, picture, suffix=""):
        tag = f"samples{suffix}" if name == "grid" else f"samples_by_{name}"
        writer.image(step, tag, picture)
        self._write(self.path(step, name, suffix), picture)

    def _write(self, file, picture):
        if processes.is_writer():
            files.make_folder(self.folder)
            image_utils.save_png(file, picture)


def scales(method):
    """Returns guidance scales from 1 to the largest that is trained, at equal ratios.

    () where guidance is no input of the network, or there is one scale alone.
    """
    largest = getattr(method, "omega_max", 1) if "omega" in method.conditions else 1
    return tuple(largest ** (i / (SCALES - 1)) for i in range(SCALES)) if largest > 1 else ()


def padded(times, steps, sampler):
    """Pads times with steps of length zero to `steps` steps, float32 (steps + 1,).

    So one compiled function serves every number of steps, with equal images: `heun` has a rule of
    its own for the last step, `consistency` draws anew before each.
    """
    more = max(steps + 1 - len(times), 0)
    if sampler == "heun":
        return np.pad(times, (more, 0), constant_values=1)
    return np.pad(times, (0, more))


def of_classes(records, labels, labelled=True):
    """Reads records of these classes: a raw batch, and which of its rows are of their class.

    Args:
      records: from `utils.dataset.open_records`.
      labels: the class of each row, int (N,).
      labelled: whether classes matter; else the first records are taken.

    Returns:
      ({key: (N, ...), "label": int32 (N,)}, bool (N,)); zeros where none is in the part of
      the records that is read, which is spread over all of them.
    """
    size = int(np.prod(records.shape)) * records.dtype.itemsize
    most = min(records.num_records, SEARCHED, max(SEARCHED_BYTES // size, CHUNK))
    places = order.spread(records.num_records, most)
    filled = np.zeros(len(labels), bool)
    batch = {}
    for start in range(0, most, CHUNK):
        read = records.read(places[start : start + CHUNK], flipped=False)
        found = read.pop("label")
        for name, rows in read.items():
            batch.setdefault(name, np.zeros((len(labels), *rows.shape[1:]), rows.dtype))
        for row, label in enumerate(found):
            free = np.flatnonzero(~filled & ((labels == label) | (not labelled)))
            if free.size:
                filled[free[0]] = True
                for name, rows in read.items():
                    batch[name][free[0]] = rows[row]
        if filled.all():
            break
    return batch | {"label": np.asarray(labels, np.int32)}, filled
