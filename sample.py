"""Images from weights: one function that draws x, the renderer, grids, and the sampling job.

Image i of a seed depends on the seed and on i alone: its noise comes from `fold_in(key, i)`, the
same to the last bit for any batch size and any number of devices. What the networks make of it is
the same to rounding: the order in which a product is summed follows from its size, so that a few
bytes in 100,000 lie on the other side of a rounding border (docs/evaluation.md#how-exact).
"""

import functools
import itertools
import logging
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import struct

from configs import saved
from methods import objective
from methods.sampler import integrate, sample_times
from parts import load_autoencoder
from parts import make as make_parts
from run import inherit, layout, report
from run import weights as weights_of
from utils import compiling, files, processes, sharding, views
from utils import conditions as given_conditions
from utils import images as image_utils

GENERATOR = "threefry2x32"  # by name: whoever draws from Python may have chosen another one
GRID_CLASSES = 10  # rows of the grid that is drawn during training
GRID_COLUMNS = 10
SMALLEST_SHOWN = 32  # pixels of an image's side in a picture for people
GRID_WIDEST = 16  # columns and rows of the grid of a sampling job


def draw_noise(seed, index, shape):
    """Draws z_1 of images number `index` (N,): standard normal float32 (N, *shape)."""
    key = jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), 0)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)


@functools.cache
def _noise_program(mesh):
    return jax.jit(draw_noise, static_argnums=2, compiler_options=compiling.quick(mesh))


def drawn_noise(mesh, seed, count, shape):
    """Draws what `draw_noise` does of images 0, 1, ..., `padded(count)` of them."""
    seed, index = np.asarray(seed).astype(np.int32), np.arange(padded(count))
    return _noise_program(mesh)(seed, index, shape)


def padded(count):
    """Rounds a number of images up to a power of two, for which programs are compiled."""
    return 1 << (count - 1).bit_length() if count else 0


def draw_fresh(seed, index, shape, k):
    """Draws the noise before step k, int32 (), of images number `index` (N,), like `draw_noise`."""
    key = jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), 2)

    def draw(i):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), k), shape)

    return jax.vmap(draw)(index)


def draw_labels(seed, index, num_classes, kind, counts=None):
    """Draws the labels of images number `index` (N,), int32.

    Args:
      kind: `random` (all classes as often), `balanced` (in turn) or `data` (as often as `counts`).
      counts: number of records of each class, int (num_classes,), for `data`.
    """
    if kind == "balanced":
        return index % max(num_classes, 1)
    key = jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), 1)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    if kind == "data" and num_classes:
        ends = np.cumsum(counts, dtype=np.int32)
        drawn = jax.vmap(lambda k: jax.random.randint(k, (), 0, ends[-1]))(keys)
        return jax.numpy.searchsorted(ends, drawn, side="right").astype(np.int32)
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, max(num_classes, 1)))(keys)


def conditions(index, labels, num_classes=0, seed=0, counts=None):
    """Returns the conditions of images number `index` (N,) by name, as objectives take them.

    Args:
      labels: one of the kinds of `draw_labels`; or the labels of all images, int32 (M,) or weights
        float32 (M, K + 1), which begin anew where there are more images.
      counts: see `draw_labels`.
    """
    if isinstance(labels, str):
        return {"y": draw_labels(seed, index, num_classes, labels, counts)}
    return {"y": labels[index % len(labels)]}


def filled_up(tree, count):
    """Fills arrays (N, ...) up to (count, ...): the first rows repeat; numpy."""
    return jax.tree.map(lambda a: np.resize(a, (count, *a.shape[1:])), tree)


def given_by(codec, source, labelled=True):
    """Makes the function index (n,) -> conditions of these images, numpy (n, ...) by name.

    Args:
      codec: `models.codec.Codec`.
      source: `utils.conditions.Source`, or None: then there is no such function, None.
      labelled: whether `y` is one of them, where the source knows it.
    """
    if source is None:
        return None

    def given(index):
        batch = source(index)
        y = {"y": batch["label"]} if labelled and codec.labelled and "label" in batch else {}
        return jax.device_get(codec.conditions_of(batch)) | y

    return given


@struct.dataclass
class Setting:
    """How images are drawn from weights; an argument of compiled functions.

    They are compiled once for each sampler and number of steps, whatever times and guidance.
    """

    sampler: str = struct.field(pytree_node=False)  # one of `methods.sampler.SAMPLERS`
    times: Any  # float32 (N + 1,), from `sample_times`
    guidance: objective.Guidance | None = None


def settings(options):
    """Returns each combination that the options `sampling` ask for, as a list of `Setting`."""
    combinations = itertools.product(options.method, times_of(options), guidances(options))
    return [Setting(*combination) for combination in combinations]


def guidances(options, scales=None):
    """Returns each combination of guidance in the options `sampling` as a `Guidance`, or [None].

    `scales`: instead of theirs.
    """
    scales = options.omega if scales is None else scales
    combinations = itertools.product(scales, options.t_min, options.t_max)
    return [
        objective.Guidance(*map(np.float32, numbers), np.int32(options.channels))
        for numbers in combinations
    ] or [None]


def times_of(options):
    """Returns the times of each number of steps that the options `sampling` ask for."""
    if options.sampling_timesteps:
        return [sample_times(0, options.sampling_timesteps)]
    return [sample_times(num_steps) for num_steps in options.num_steps]


def generate(parts, seed, params, index, given, setting, noise=None):
    """Draws x number `index` (N,) from noise, float32 (N, h, w, c). Pure.

    Args:
      parts: `parts.Parts`.
      seed: of the noise.
      given: from `conditions`.
      setting: `Setting`.
      noise: z_1, float32 (N, h, w, c); None: `draw_noise`.
    """
    if noise is None:
        noise = draw_noise(seed, index, parts.image_shape)
    return integrate(
        parts.method, parts.net, parts.gather(params), noise, given, setting.times,
        guidance=setting.guidance, sampler=setting.sampler,
        fresh=partial(draw_fresh, seed, index, parts.image_shape),
    )  # fmt: skip


class Renderer:
    """Draws images of chosen classes on all devices, a batch at a time.

    Args:
      parts: `parts.Parts`.
      autoencoder: from `models.vae.load`.
      seed: of the noise.
      device_batch_size: images per device at a time.
    """

    def __init__(self, parts, autoencoder, seed, device_batch_size):
        self.mesh, self.codec = parts.mesh, parts.codec
        self.vae_params = sharding.place_everywhere(self.mesh, autoencoder.params)
        self.batch_size = device_batch_size * self.mesh.size

        def images(params, vae_params, index, given, setting):
            x = generate(parts, seed, params, index, given, setting)
            return autoencoder.finished(vae_params, x)

        how = {
            "out_shardings": sharding.replicated(self.mesh),
            "compiler_options": compiling.quick(self.mesh),
        }
        self._images, self._decode = jax.jit(images, **how), jax.jit(autoencoder.finished, **how)

    def __call__(self, params, labels, setting, given=None):
        """Yields images number 0, 1, ... of classes `labels` (N,) in batches uint8 (n, H, W, C).

        `given`: of further conditions, or None; see `given_by`.
        """
        labels, count = np.asarray(labels, np.int32), len(labels)
        size = min(self.batch_size, count)
        for start in range(0, count, size):
            # The last batch is filled up with the first images: one compiled function for all.
            index = np.arange(start, start + size, dtype=np.int32) % count
            more = given(index) if given else {}
            batch = jax.tree.map(self._place, (index, conditions(index, labels) | more))
            images = self._images(params, self.vae_params, *batch, setting)
            yield np.asarray(images)[: count - start]

    def decode(self, x):
        """Decodes x float32 (N, h, w, c), equal in all processes, to images uint8 (N, H, W, C)."""
        batches = [x[i : i + self.batch_size] for i in range(0, len(x), self.batch_size)]
        images = [self._decode(self.vae_params, self._place(batch)) for batch in batches]
        pairs = zip(images, batches, strict=True)
        return np.concatenate([np.asarray(image)[: len(batch)] for image, batch in pairs])

    def _place(self, rows):
        """Places rows on the devices; the first ones repeat until their number can be divided."""
        count = -(-len(rows) // self.mesh.size) * self.mesh.size
        return sharding.place(np.resize(rows, (count, *rows.shape[1:])), sharding.by_row(self.mesh))


def grid_labels(num_classes):
    """Returns labels of a grid with a row per class: at most ten classes, spread over all."""
    rows = min(num_classes or GRID_CLASSES, GRID_CLASSES)
    classes = np.arange(rows) * num_classes // rows
    return np.repeat(classes, GRID_COLUMNS)


def picture(images, columns):
    """Makes images uint8 (N, h, w, C) one, framed, small ones enlarged: uint8 (H, W, C)."""
    images = image_utils.shown(images)
    factor = max(1, SMALLEST_SHOWN // max(images.shape[1:3]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    return image_utils.grid(images, columns)


def grid(renderer, params, labels, setting, given=None):
    """Draws a picture uint8 (H, W, C) of samples of classes `labels` from `grid_labels`."""
    return picture(np.concatenate(list(renderer(params, labels, setting, given))), GRID_COLUMNS)


def run(renderer, params, options, num_classes, output, setting, source=None):
    """Draws `options.num_images` images and writes them into the folder `output`, which it returns.

    Writes grid.png (of the first images) and, by `options.format`, one PNG per image or
    samples.npz (`arr_0` uint8 (N, H, W, C), `arr_1` labels), the latter of values, float32. Of a
    `utils.conditions.Source` the labels are taken, unless options name some, and its conditions
    are written beside the images.
    """
    classes = list(options.labels) or list(range(num_classes)) or [0] * GRID_COLUMNS
    labels, count = np.resize(classes, options.num_images), options.num_images
    if source and num_classes and not options.labels:
        labels = labels if (theirs := source.labels(count)) is None else theirs
    output = files.path(output)
    images = []
    given = given_by(renderer.codec, source, labelled=False)
    batches = renderer(params, labels, setting, given)
    number = -(-count // renderer.batch_size)
    for batch in processes.progress(batches, number, "batches", "sample", processes.is_writer()):
        processes.check_stop()
        images.extend(batch)
    beside = views.around(renderer, source, np.stack(images)) if source else {}
    if processes.is_writer():
        files.make_folder(output)
        columns = min(len(classes), GRID_WIDEST)
        first = np.stack(images[: columns * GRID_WIDEST])
        image_utils.save_png(output / "grid.png", picture(first, columns))
        if beside:
            rows = np.concatenate([row[:GRID_COLUMNS] for row in beside.values()])
            path = output / "pairs.png"
            image_utils.save_png(path, picture(rows, min(count, GRID_COLUMNS)))
        if options.format == "npz" or first.dtype != np.uint8:
            with (
                files.complete(output / "samples.npz") as unfinished,
                unfinished.open("wb") as file,
            ):
                np.savez(
                    file, np.stack(images), labels, **(source(np.arange(count)) if source else {})
                )
        else:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                image_utils.save_png(output / f"{i:06d}_class{label}.png", image)
                for name in beside.keys() - {"sample"}:
                    image_utils.save_png(output / f"{i:06d}_{name}.png", beside[name][i])
    return output


def sample_job(config, workdir):
    """Draws `sampling.num_images` images from `load_from`, or from the run in `workdir`.

    With several guidances each draws the same noise and labels, into a folder of its own.
    """
    parts, options = make_parts(config), config.sampling
    where = config.load_from or workdir
    weights = weights_of.load(
        where, parts.param_shapes(), config.dataset, may_lack=parts.module.only_for_training
    )
    inherit.check(saved.flat(config), weights, where)
    weights = weights_of.place(weights, parts.mesh)
    autoencoder = load_autoencoder(config.dataset, options.vae_dtype)
    inherit.check_autoencoder(weights.identity, autoencoder, where)
    renderer = Renderer(parts, autoencoder, options.seed, config.fid.device_batch_size)
    report.tell(report.network(config.model.cls, parts))
    report.tell(report.sampling(report.origin(weights.step, where), options, files.path(workdir)))
    first, asked = settings(options)[0], guidances(options)
    source = given_conditions.source(parts.codec.given, config.dataset, options)
    params, classes = weights_of.choose(weights, "ema"), config.dataset.num_classes
    for guidance in asked:
        name = f"step_{weights.step}"
        if len(asked) > 1:
            name += "".join(f"_{k}{getattr(guidance, k):g}" for k in ("omega", "t_min", "t_max"))
        output = files.path(workdir) / layout.SAMPLES / name
        setting = first.replace(guidance=guidance)
        run(renderer, params, options, classes, output, setting, source)
        logging.info("%d images of step %d: %s", options.num_images, weights.step, output)


if __name__ == "__main__":
    raise SystemExit(report.not_a_command(__file__, " --config.sample_only=True"))
