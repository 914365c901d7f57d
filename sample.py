"""Images from weights: the generator, grids, and the sampling job.

Image i of a seed depends on the seed and on i alone: its noise comes from `fold_in(key, i)`. So
the same images come out for any batch size and any number of devices.
"""

import itertools
import logging
import pathlib
from functools import partial

import jax
import numpy as np

import parts
from methods import objective
from methods.sampler import integrate, sample_times
from run import inherit, report, weights
from utils import files, processes, sharding
from utils import images as image_utils

GRID_CLASSES = 10  # rows of the grid that is drawn during training
GRID_COLUMNS = 10
SMALLEST_SHOWN = 32  # pixels of an image's side in a picture for people
GRID_WIDEST = 16  # columns and rows of the grid of a sampling job


def draw_noise(seed, index, shape):
    """z_1 of images number `index` (N,): standard normal float32 (N, *shape)."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)


def draw_fresh(seed, index, shape, k):
    """The noise before step k, int32 (), of images number `index` (N,), like `draw_noise`."""
    key = jax.random.fold_in(jax.random.key(seed), 2)

    def draw(i):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), k), shape)

    return jax.vmap(draw)(index)


def draw_labels(seed, index, num_classes, kind):
    """Labels of images number `index` (N,), int32: `random` (uniform) or `balanced` (in turn)."""
    if kind == "balanced":
        return index % max(num_classes, 1)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, max(num_classes, 1)))(keys)


def guidances(options):
    """What the options `sampling` ask for: each combination as a `Guidance`, or [None]."""
    combinations = itertools.product(options.omega, options.t_min, options.t_max)
    return [
        objective.Guidance(*map(np.float32, numbers), np.int32(options.channels))
        for numbers in combinations
    ] or [None]


def times_of(options):
    """The times of each number of steps that the options `sampling` ask for."""
    if options.sampling_timesteps:
        return [sample_times(0, options.sampling_timesteps)]
    return [sample_times(num_steps) for num_steps in options.num_steps]


def generate(model, seed, sampler, params, index, labels, times, guidance):
    """What the network makes of noise: x number `index` (N,) of classes `labels` (N,). Pure.

    Args:
      model: `parts.Parts`.
      seed: of the noise.
      sampler: one of `SAMPLERS`.
      times: from `sample_times`.
      guidance: one of `guidances`.
    """
    noise = draw_noise(seed, index, model.image_shape)
    return integrate(
        model.method, model.net, params, noise, {"y": labels}, times,
        guidance=guidance, sampler=sampler,
        fresh=partial(draw_fresh, seed, index, model.image_shape),
    )  # fmt: skip


class Sampler:
    """Draws images of chosen classes on all devices, a batch at a time.

    Args:
      model: `parts.Parts`.
      autoencoder: from `models.vae.load`.
      options: the options `sampling`.
      device_batch_size: images per device at a time.
    """

    def __init__(self, model, autoencoder, options, device_batch_size):
        self.mesh = model.mesh
        self.vae_params = sharding.place_everywhere(self.mesh, autoencoder.params)
        self.batch_size = device_batch_size * self.mesh.size

        def images(params, vae_params, *arguments):
            x = generate(model, options.seed, options.method[0], params, *arguments)
            return image_utils.to_uint8(autoencoder.decode(vae_params, x))

        def decoded(vae_params, x):
            return image_utils.to_uint8(autoencoder.decode(vae_params, x))

        self._generate = jax.jit(images, out_shardings=sharding.replicated(self.mesh))
        self._decode = jax.jit(decoded, out_shardings=sharding.replicated(self.mesh))

    def __call__(self, params, labels, times, guidance=None):
        """Yields images number 0, 1, ... of classes `labels` (N,) in batches uint8 (n, H, W, C)."""
        index, labels = np.arange(len(labels), dtype=np.int32), np.asarray(labels, np.int32)
        for start in range(0, len(labels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = self._place(index[rows]), self._place(labels[rows])
            images = self._generate(params, self.vae_params, *batch, times, guidance)
            yield np.asarray(images)[: len(labels[rows])]

    def decode(self, x):
        """x float32 (N, h, w, c), the same in all processes -> images uint8 (N, H, W, C)."""
        batches = [x[i : i + self.batch_size] for i in range(0, len(x), self.batch_size)]
        images = [self._decode(self.vae_params, self._place(batch)) for batch in batches]
        pairs = zip(images, batches, strict=True)
        return np.concatenate([np.asarray(image)[: len(batch)] for image, batch in pairs])

    def _place(self, rows):
        """Rows on the devices, the first ones again where their number cannot be divided."""
        count = -(-len(rows) // self.mesh.size) * self.mesh.size
        return sharding.place(np.resize(rows, (count, *rows.shape[1:])), sharding.by_row(self.mesh))


def grid_labels(num_classes):
    """Labels of a grid with a row per class: at most ten classes, spread over all."""
    rows = min(num_classes or GRID_CLASSES, GRID_CLASSES)
    classes = np.arange(rows) * num_classes // rows
    return np.repeat(classes, GRID_COLUMNS)


def picture(images, columns):
    """Images uint8 (N, h, w, C) as one, framed, small ones enlarged: uint8 (H, W, C)."""
    factor = max(1, SMALLEST_SHOWN // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    return image_utils.grid(images, columns)


def grid(sampler, params, labels, times, guidance):
    """A picture of samples of classes `labels`, as `grid_labels` gives them, uint8 (H, W, C)."""
    images = np.concatenate(list(sampler(params, labels, times, guidance)))
    return picture(images, GRID_COLUMNS)


def run(sampler, params, options, num_classes, output, guidance):
    """The sampling job: draws `options.num_images` images and writes them below `output`.

    Writes grid.png (of the first images) and, by `options.format`, one PNG per image or
    samples.npz (`arr_0` uint8 (N, H, W, C), `arr_1` labels). Returns the folder.
    """
    classes = list(options.labels) or list(range(num_classes)) or [0] * GRID_COLUMNS
    times = times_of(options)[0]
    labels = np.resize(classes, options.num_images)
    output = pathlib.Path(output)
    images = []
    batches = sampler(params, labels, times, guidance)
    count = -(-len(labels) // sampler.batch_size)
    for batch in processes.progress(batches, count, "batches", "sample", processes.is_writer()):
        processes.check_stop()
        images.extend(batch)
    if processes.is_writer():
        output.mkdir(parents=True, exist_ok=True)
        columns = min(len(classes), GRID_WIDEST)
        first = np.stack(images[: columns * GRID_WIDEST])
        image_utils.save_png(output / "grid.png", picture(first, columns))
        if options.format == "npz":
            with (
                files.complete(output / "samples.npz") as unfinished,
                unfinished.open("wb") as file,
            ):
                np.savez(file, np.stack(images), labels)
        else:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                image_utils.save_png(output / f"{i:06d}_class{label}.png", image)
    return output


def sample_job(config, workdir):
    """Draws `sampling.num_images` images from `load_from`, or from the run in `workdir`.

    With several guidances each draws the same noise and labels, into a folder of its own.
    """
    model = parts.make(config)
    where = config.load_from or workdir
    found = weights.load(
        where, model.param_shapes(), config, may_lack=model.module.only_for_training
    )
    inherit.check(config, found, where)
    found = weights.place(found, model.mesh)
    autoencoder = parts.load_autoencoder(config)
    inherit.check_autoencoder(found, autoencoder, where)
    sampler = Sampler(model, autoencoder, config.sampling, config.fid.device_batch_size)
    report.tell(report.sampling(config, model, found, pathlib.Path(workdir)))
    options, asked = config.sampling, guidances(config.sampling)
    for guidance in asked:
        name = f"step_{found['step']}"
        if len(asked) > 1:
            name += "".join(f"_{k}{getattr(guidance, k):g}" for k in ("omega", "t_min", "t_max"))
        output = pathlib.Path(workdir) / "samples" / name
        run(sampler, found["ema_params"][0], options, config.dataset.num_classes, output, guidance)
        logging.info("%d images of step %d: %s", options.num_images, found["step"], output)


if __name__ == "__main__":
    raise SystemExit(report.not_a_command(__file__, " --config.sample_only=True"))
