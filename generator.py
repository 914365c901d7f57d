"""Trained networks from Python: one call loads weights of any origin with their own config.

    import generator

    model = generator.load("logs/me/quickstart")
    images = model.sample([3, 1, 4])  # uint8 (3, H, W, C)

docs/python.md shows the rest. What is loaded lies on one device, the first.
"""

import functools

import jax
import numpy as np

import parts
import sample
from configs import load_config
from methods.sampler import SAMPLERS, check_times, sample_times
from models import network
from run import inherit, weights
from utils import environment, sharding
from utils import images as image_utils

OUTPUTS = ("uint8", "float", "latents")


def load(source, *options, config=None, step=None, average="ema"):
    """A `Generator` of a run, a published or an exported checkpoint.

    Args:
      source: a run's folder (WORKDIR, or the `best` in it); a published checkpoint of MeanFlow or
        improved MeanFlow; what scripts/export_checkpoint.py wrote.
      options: as on the command line without `--config.`: "dataset.vae=/path/to/vae".
      config: name of a file of configs/, or a path of one that ends in .yml; None: the options
        that the weights bring along, and for published checkpoints, which bring none, the config
        whose network has their shapes.
      step: which checkpoint of a run; None: the newest that is whole.
      average: which weights, as `fid.weights` names them: ema | ema_DECAY | ema_sigmaS | params.

    Raises:
      FileNotFoundError, ValueError: nothing there, damaged, or options that contradict the
        weights; one line.
    """
    environment.pin()
    source = str(source)
    found = weights.read(source, step=step)
    if config is None:
        config = "default" if found["config"] else _published_config(source, found, options)
    config = _config(config, options, source)
    parts.check(config)
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    model = parts.make(config, mesh)
    may_lack = model.module.only_for_training
    found = weights.checked(found, source, model.param_shapes(), config, may_lack)
    inherit.check(config, found, source)
    if average.startswith("ema_sigma"):
        found = weights.place(found, mesh)  # it may have to be reconstructed
    params = weights.choose(found, average, "average")
    options = found["config"] or config.to_dict()
    return Generator(config, model, params, source, found["step"], options, found["identity"])


def mix(first, second, share):
    """Noise between two noises: cos(share pi/2) first + sin(share pi/2) second.

    A mixture of independent standard normal noises is standard normal, which a straight line
    between them would not be. `share` is a number in [0, 1], or an array that is broadcast.
    """
    angle = np.float32(np.pi / 2) * np.asarray(share, np.float32)
    return np.cos(angle) * first + np.sin(angle) * second


class Generator:
    """Draws images of trained weights. Compiles once for each shape and number of steps.

    Attributes:
      config: the whole config, a locked ConfigDict; parts: what it makes, `parts.Parts`.
      params: the parameters on the device; step: of their checkpoint.
      options, identity: those of the run, which the weights bring along; nested dicts.
      num_classes: K; 0: unconditional.
      image_shape: (h, w, c) of noise and latents.

    `labels` and `y` are either classes, whole numbers (N,) in 0..K-1 or K for no label; or weights
    over the classes, float (N, K) or (N, K + 1) with no label last, whose embeddings are mixed
    accordingly. Of an unconditional network they only say how many. All arrays are numpy's.
    """

    def __init__(self, config, model, params, source, step, options, identity):
        self.config, self.step, self.parts, self._source = config, step, model, source
        self.options, self.identity = options, identity
        self.num_classes, self.image_shape = model.num_classes, model.image_shape
        self.params = sharding.place(params, sharding.by_parameter(model.mesh, params))
        self._sample = jax.jit(self._draw, static_argnames="output")
        self._velocity = jax.jit(self._velocity_of)

    def noise(self, count, seed=0):
        """The noise that `sample` draws for `count` images of a seed, float32 (count, h, w, c)."""
        return np.asarray(sample.draw_noise(seed, np.arange(count), self.image_shape))

    def sample(
        self, labels, noise=None, num_steps=1, omega=None, seed=0, *, output="uint8", sampler="ode"
    ):
        """Images of the classes `labels`.

        Args:
          labels: (N,) or (N, K), see the class.
          noise: z_1, float (N, h, w, c); None: `noise(N, seed)`.
          num_steps: network evaluations, or the times themselves, falling from 1 to 0.
          omega: guidance scale, for networks that are guided in sampling (method.name improved or
            flow), in the interval that their config names (sampling.t_min, t_max); None: that of
            the config, or none. Others are trained with their guidance, and refuse one.
          output: `uint8`: images (N, H, W, C); `float`: the same before rounding, near [-1, 1] and
            not clipped; `latents`: x as the network gives it, (N, h, w, c), for which no
            autoencoder is needed.
          sampler: see `methods.sampler.integrate`.

        Raises:
          ValueError: an argument that does not fit; FileNotFoundError: no weights of the
            autoencoder that turns latents into images.
        """
        y = self._labels(labels)
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed: a whole number from 0 to 2^31 - 1, got {seed}")
        if output not in OUTPUTS:
            raise ValueError(f"output: {output!r} is not one of {', '.join(OUTPUTS)}")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}")
        z = self.noise(len(y), seed) if noise is None else self._images(noise, len(y), "noise")
        vae_params = {} if output == "latents" else self._autoencoder[1]
        setting = sample.Setting(sampler, _times(num_steps), self.guidance(omega))
        arguments = self.params, vae_params, z, y, setting, np.int32(seed)
        return np.asarray(self._sample(*arguments, output=output))

    def u(self, z, t, h, y, omega=None):
        """The average velocity over [t - h, t] at z, float32 (N, h, w, c); h = 0: the velocity v.

        Args:
          z: float (N, h, w, c).
          t, h: numbers or (N,), in [0, 1] with h <= t; t = 1 is noise, t = 0 is data.
          y: labels of z, see the class.
          omega: see `sample`.
        """
        y = self._labels(y)
        z = self._images(z, len(y), "z")
        t, h = (np.broadcast_to(np.asarray(a, np.float32), len(y)) for a in (t, h))
        arguments = self.params, z, t, t - h, y, self.guidance(omega)
        return np.asarray(self._velocity(*arguments))

    def decode(self, latents):
        """Latents (N, h, w, c), as `sample` gives them -> images uint8 (N, H, W, C)."""
        latents = self._images(latents, len(latents), "latents")
        return np.asarray(self._decode(self._autoencoder[1], latents))

    # Pure, compiled ------------------------------------------------------------------------------

    def _draw(self, params, vae_params, noise, y, setting, seed, *, output):
        index = np.arange(len(noise))
        x = sample.generate(self.parts, seed, params, index, y, setting, noise)
        if output == "latents":
            return x
        images = self._autoencoder[0].decode(vae_params, x)
        return image_utils.to_uint8(images) if output == "uint8" else images

    def _velocity_of(self, params, z, t, r, y, guidance):
        method, net = self.parts.method, self.parts.net
        return method.velocity(net, params, z, t, r, {"y": y}, method.guidance_at(guidance, t))

    @functools.cached_property
    def _decode(self):
        decode = self._autoencoder[0].decode
        return jax.jit(lambda vae_params, x: image_utils.to_uint8(decode(vae_params, x)))

    @functools.cached_property
    def _autoencoder(self):
        """The autoencoder of `dataset.vae`, and its parameters on the device."""
        try:
            found = parts.load_autoencoder(self.config)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; output='latents' needs none") from None
        inherit.check_autoencoder({"identity": self.identity}, found, self._source)
        return found, sharding.place_everywhere(self.parts.mesh, found.params)

    # Arguments -----------------------------------------------------------------------------------

    def _labels(self, labels):
        labels, classes = np.asarray(labels), self.num_classes
        if labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels):
            if not classes:
                return np.zeros(len(labels), np.int32)
            if labels.min() >= 0 and labels.max() <= classes:
                return labels.astype(np.int32)
        if labels.ndim == 2 and labels.dtype.kind in "iuf" and len(labels) and classes:
            missing = classes + 1 - labels.shape[1]
            if missing in (0, 1) and np.isfinite(labels).all():
                return np.pad(labels.astype(np.float32), ((0, 0), (0, missing)))
        kinds = f"classes 0..{classes} ({classes}: none), or finite weights (N, {classes})"
        raise ValueError(f"labels: {kinds if classes else 'whole numbers'}, not {_shown(labels)}")

    def _images(self, array, count, name):
        array = np.asarray(array, np.float32)
        if array.shape != (count, *self.image_shape):
            wanted = (count, *self.image_shape)
            raise ValueError(f"{name}: {array.shape} instead of {wanted}, one for each label")
        return array

    def guidance(self, omega=None):
        """What `omega` stands for, see `sample`: a `Guidance`, or None."""
        if omega is None:
            return sample.guidances(self.config.sampling)[0]
        if not self.parts.method.guided_at_sampling:
            raise ValueError(
                f"omega: the guidance of method.name {self.config.method.name} is trained in; "
                "leave it out"
            )
        if not np.isscalar(omega) or not omega > 0:
            raise ValueError(f"omega must be a number above 0, got {omega!r}")
        options = self.config.sampling.copy_and_resolve_references()
        with options.unlocked():
            options.omega = (float(omega),)
        return sample.guidances(options)[0]


def _times(num_steps):
    if not np.ndim(num_steps):
        if num_steps != int(num_steps) or num_steps < 1:
            raise ValueError(f"num_steps must be a whole number of 1 or more, got {num_steps}")
        return np.asarray(sample_times(int(num_steps)))
    check_times(times := tuple(map(float, num_steps)))
    return np.asarray(sample_times(0, times))


def _shown(labels):
    if labels.ndim == 1 and 0 < len(labels) <= 10:
        return labels.tolist()
    return f"{labels.dtype} {labels.shape}"


def _config(name, options, source):
    """The config `name` with `options`, and with those of the weights of `source`."""
    file = name if str(name).endswith(".yml") else f"configs/load_config.py:{name}"
    argv = [f"--config={file}", "--config.sample_only=True"]
    argv += ["--config.dataset.root=none", *(f"--config.{option}" for option in options)]
    config, rest = load_config.from_command_line(argv)
    if rest:
        raise ValueError(f"options: {rest[0]!r} is not 'section.option=value'")
    return inherit.adopt(config, source, load_config.given(argv), sampling=True)


def _published_config(source, found, options):
    """The name of the config whose network has the shapes of published weights."""
    for name in found["configs"]:
        config = _config(name, options, source)
        module = parts.make_module(config)
        shapes = network.param_shapes(module, parts.image_shape(config))
        try:
            weights.check_parameters("", shapes, found["ema_params"][0], module.only_for_training)
        except ValueError:
            continue
        return name
    raise ValueError(
        f"{source} does not tell its options, and its shapes are those of none of "
        f"{', '.join(found['configs'])}: name one of configs/ that fits, load(..., config=NAME)"
    )
