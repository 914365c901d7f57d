"""Images from weights: loading weights, the generator, grids, and the sampling job.

Image i of a seed depends on the seed and on i alone: its noise comes from `fold_in(key, i)`. So
the same images come out for any batch size and any number of devices.
"""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from models import dit, meanflow, released, vae
from utils import checkpoint, processes, sharding
from utils import images as image_utils

GRID_CLASSES = 10  # rows of the grid that is drawn during training
GRID_COLUMNS = 10
SMALLEST_SHOWN = 32  # pixels of an image's side in a picture for people
GRID_WIDEST = 16  # columns and rows of the grid of a sampling job


def draw_noise(seed, index, shape):
    """z_1 of images number `index` (N,): standard normal float32 (N, *shape)."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)


def draw_labels(seed, index, num_classes, kind):
    """Labels of images number `index` (N,), int32: `random` (uniform) or `balanced` (in turn)."""
    if kind == "balanced":
        return index % max(num_classes, 1)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, max(num_classes, 1)))(keys)


def generate(net, decode, params, vae_params, index, labels, times, *, seed, shape):
    """Images number `index` (N,) of classes `labels` (N,), uint8 (N, H, W, C). Pure; for `jit`.

    Args:
      net: function (params, z, t, h, y) -> u.
      decode: function (vae_params, x) -> images in [-1, 1].
      times: from `meanflow.sample_times`.
      shape: (h, w, c) of what the network sees.
    """
    noise = draw_noise(seed, index, shape)
    x = meanflow.sample(net, params, noise, labels, times)
    return image_utils.to_uint8(decode(vae_params, x))


class Sampler:
    """Draws images of chosen classes on all devices, a batch at a time.

    Args:
      net, autoencoder: see `generate`; `autoencoder` is from `models.vae.load`.
      mesh: devices.
      shape: (h, w, c) of what the network sees.
      seed: of the noise.
      device_batch_size: images per device at a time.
    """

    def __init__(self, net, autoencoder, mesh, *, shape, seed, device_batch_size):
        self.mesh = mesh
        self._vae_params = sharding.place_everywhere(mesh, autoencoder.params)
        self.batch_size = device_batch_size * mesh.size
        self._generate = jax.jit(
            lambda params, vae_params, index, labels, times: generate(
                net, autoencoder.decode, params, vae_params, index, labels, times,
                seed=seed, shape=shape,
            ),
            out_shardings=sharding.replicated(mesh),
        )  # fmt: skip

    def __call__(self, params, labels, times):
        """Yields images number 0, 1, ... of classes `labels` (N,) in batches uint8 (n, H, W, C)."""
        labels = np.asarray(labels, np.int32)
        rows = sharding.by_row(self.mesh)
        for start in range(0, len(labels), self.batch_size):
            count = min(self.batch_size, len(labels) - start)
            padded = -(-count // self.mesh.size) * self.mesh.size
            index = start + np.arange(padded, dtype=np.int32)
            batch = sharding.place(
                (index, np.resize(labels[start : start + count], padded)), (rows, rows)
            )
            images = self._generate(params, self._vae_params, *batch, times)
            yield np.asarray(images)[:count]


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


def grid(sampler, params, labels, times):
    """A picture of samples of classes `labels`, as `grid_labels` gives them, uint8 (H, W, C)."""
    return picture(np.concatenate(list(sampler(params, labels, times))), GRID_COLUMNS)


def run(sampler, params, options, num_classes, output):
    """The sampling job: draws `options.num_images` images and writes them below `output`.

    Writes grid.png (of the first images) and, by `options.format`, one PNG per image or
    samples.npz (`arr_0` uint8 (N, H, W, C), `arr_1` labels). Returns the folder.
    """
    classes = list(options.labels) or list(range(num_classes)) or [0] * GRID_COLUMNS
    times = meanflow.sample_times(options.num_steps[0], options.sampling_timesteps)
    labels = np.resize(classes, options.num_images)
    output = pathlib.Path(output)
    images = []
    batches, count = sampler(params, labels, times), -(-len(labels) // sampler.batch_size)
    for batch in processes.progress(batches, count, "batches", "sample", processes.is_writer()):
        processes.check_stop()
        images.extend(batch)
    if processes.is_writer():
        output.mkdir(parents=True, exist_ok=True)
        columns = min(len(classes), GRID_WIDEST)
        first = np.stack(images[: columns * GRID_WIDEST])
        image_utils.save_png(output / "grid.png", picture(first, columns))
        if options.format == "npz":
            np.savez(output / "samples.npz", np.stack(images), labels)
        else:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                image_utils.save_png(output / f"{i:06d}_class{label}.png", image)
    return output


# Weights --------------------------------------------------------------------------------------


def load_weights(path, shapes, optimizer=False):
    """The weights of a run or of a published checkpoint, as numpy trees of the model's `shapes`.

    Args:
      path: a run's workdir, or a published checkpoint (its file, or the folder that holds it).
      shapes: the tree of the model's parameters as `ShapeDtypeStruct`.
      optimizer: whether to read Adam's moments too.

    Returns:
      A dict of `step`, `params`, `ema_params` (a tuple, one tree for each decay), `ema_vals` (their
      decays, empty where the file does not say) and `opt_state` ({"count", "mu", "nu"} of Adam
      where asked for and stored, else None).

    Raises:
      FileNotFoundError, ValueError: nothing there, or weights of another model.
    """
    if checkpoint.steps(path):
        weights = {"opt_state": None} | checkpoint.restore_weights(path, optimizer=optimizer)
        weights["ema_vals"] = weights.pop("config").get("training", {}).get("ema_val", ())
    else:
        weights = released.load(path)
        weights["ema_params"], weights["ema_vals"] = (weights["ema_params"],), ()
    for name, tree in (("params", weights["params"]), ("ema_params", weights["ema_params"][0])):
        released.check_tree(shapes, tree, f"{name} of {path}")
    return weights


def choose_weights(weights, name):
    """One set of weights by its name: `params`, `ema` (the first average) or `ema_DECAY`."""
    averages = weights["ema_params"]
    names = {"params": weights["params"], "ema": averages[0]}
    names |= {
        f"ema_{decay}": ema for decay, ema in zip(weights["ema_vals"], averages, strict=False)
    }
    if name not in names:
        raise ValueError(f"fid.weights: {name!r} is none of {', '.join(names)}")
    return names[name]


# From a config -------------------------------------------------------------------------------


def make_net(config):
    """The network that a config names."""
    return dit.build(
        **config.model,
        image_size=config.dataset.image_size,
        num_classes=config.dataset.num_classes,
        dtype=jnp.dtype(network_dtype(config)),
    )


def network_dtype(config):
    """The type of the network's products, by name."""
    return "bfloat16" if config.training.half_precision else "float32"


def image_shape(config):
    """(h, w, c) of what the network sees."""
    return (config.dataset.image_size, config.dataset.image_size, config.dataset.image_channels)


def make_autoencoder(config):
    """The autoencoder that a config names, with its weights."""
    normalisation = vae.normalisation(config.dataset.latent_mean, config.dataset.latent_std)
    return vae.load(config.dataset.vae, normalisation, config.sampling.vae_dtype)


def make_sampler(config, mesh, net, autoencoder):
    """The sampler of a config."""
    return Sampler(
        dit.as_function(net, sharding.gather(mesh)),
        autoencoder,
        mesh,
        shape=image_shape(config),
        seed=config.sampling.seed,
        device_batch_size=config.fid.device_batch_size,
    )


def place_weights(weights, mesh):
    """The trees of `load_weights` on the devices."""

    def place(tree):
        return sharding.place(tree, sharding.by_parameter(mesh, tree))

    return weights | {name: place(weights[name]) for name in ("params", "ema_params")}


def sample_job(config, workdir):
    """Draws `sampling.num_images` images from `load_from`, or from the run in `workdir`."""
    mesh = sharding.make_mesh(config.mesh.fsdp)
    net = make_net(config)
    shapes = jax.eval_shape(lambda: dit.init_params(net, jax.random.key(0), image_shape(config)))
    weights = load_weights(config.load_from or workdir, shapes)
    sampler = make_sampler(config, mesh, net, make_autoencoder(config))
    params = place_weights(weights, mesh)["ema_params"][0]
    output = pathlib.Path(workdir) / "samples" / f"step_{weights['step']}"
    run(sampler, params, config.sampling, config.dataset.num_classes, output)
    logging.info("%d images of step %d: %s", config.sampling.num_images, weights["step"], output)
