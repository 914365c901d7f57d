"""Trained networks from Python: one call loads weights of any origin with their own config.

    import generator

    model = generator.load("logs/me/quickstart")
    images = model.sample([3, 1, 4])  # uint8 (3, H, W, C)

docs/python.md shows the rest. What is loaded lies on one device, the first of this process. The
settings of jax that images depend on hold within each call, and leave the process's own alone.
"""

import functools
import importlib.util
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = ("configs", "formats", "methods", "metrics", "models", "parts", "run", "sample", "utils")


def check_names():
    """Raises ImportError where a module of another project has a name that this one needs."""
    for name in NAMES:
        if module := sys.modules.get(name):
            file, folders = getattr(module, "__file__", None), getattr(module, "__path__", ())
            taken = "was imported before; rename it, or work in another process"
        elif spec := importlib.util.find_spec(name):
            file, folders = spec.origin, spec.submodule_search_locations or ()
            taken = f"comes first in sys.path: sys.path.insert(0, {str(FOLDER)!r})"
        else:
            continue
        place = file or next(iter(folders), "a module without a file")
        if not Path(place).resolve().is_relative_to(FOLDER):
            raise ImportError(f"{FOLDER / 'generator.py'} needs its own {name}: {place} {taken}")


check_names()

import jax
import jax.numpy as jnp
import numpy as np

import parts
import sample
from configs import saved
from methods.sampler import SAMPLERS, integrate, times_of
from run import config as run_config
from run import inherit
from run import weights as weights_of
from utils import compiling, environment, sharding
from utils import conditions as given_conditions
from utils.images import to_float

OUTPUTS = ("uint8", "float", "latents")


@environment.pinned()
def load(source, *options, config=None, step=None, average="ema"):
    """Loads a `Generator` from a run, a published or an exported checkpoint.

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
    source = os.path.expanduser(str(source))
    weights = weights_of.read(source, step=step)
    if config is None:
        config = "default" if weights.config else run_config.published(source, weights, options)
    config = run_config.of_weights(config, options, source)
    mesh = sharding.make_mesh(1, jax.local_devices()[:1])
    made = parts.make(config, mesh)
    may_lack = made.module.only_for_training
    weights = weights_of.checked(weights, source, made.param_shapes(), config.dataset, may_lack)
    inherit.check(saved.flat(config), weights, source)
    if average.startswith("ema_sigma"):
        weights = weights_of.place(weights, mesh)  # it may have to be reconstructed
    params = weights_of.choose(weights, average, "average")
    told = weights.config or config.to_dict()
    return Generator(config, made, params, source, weights.step, told, weights.identity)


def mix(first, second, share):
    """Mixes two noises into one between them: cos(share pi/2) first + sin(share pi/2) second.

    A mixture of independent standard normal noises is standard normal, which a straight line
    between them would not be. `share` is a number in [0, 1], or an array that is broadcast.
    """
    angle = np.float32(np.pi / 2) * np.asarray(share, np.float32)
    return np.cos(angle) * first + np.sin(angle) * second


class Generator:
    """Draws images of trained weights. Compiles once for each number of steps and 2^k images.

    Attributes:
      config: the whole config, a locked ConfigDict; parts: what it makes, `parts.Parts`.
      params: the parameters on the device; vae_params: those of the autoencoder, {} without one.
      step: that of their checkpoint.
      options, identity: those of the run, which the weights bring along; nested dicts.
      num_classes: K; 0: unconditional. image_shape: (h, w, c) of noise and latents.
      conditions: those that come with the data, of `utils.conditions.Condition`.

    `labels` and `y` are either classes, whole numbers (N,) in 0..K-1 or K for no label; or weights
    over the classes, float (N, K) or (N, K + 1) with no label last, whose embeddings are mixed
    accordingly. Of an unconditional network they only say how many. The argument `conditions` is
    {name: array}: (N, ...), or one row for all images; bytes of an image, else numbers as records
    have them. One that is left out is dropped; where the network always has it (`kept_conditions`)
    that is an error. All arrays are numpy's, but for those of `function`.
    """

    def __init__(self, config, parts, params, source, step, options, identity):
        # On one device nothing has to be gathered, and others may differentiate it as they like.
        self.parts = parts._replace(gather=parts.module.cast)
        self.config, self.step, self._source = config, step, source
        self.options, self.identity = options, identity
        self.num_classes, self.image_shape = parts.num_classes, parts.image_shape
        self.conditions, self._device = parts.codec.given, parts.mesh.devices.flat[0]
        self.params = jax.device_put(params, self._device)
        options = compiling.quick(parts.mesh)
        self._sample = jax.jit(self._draw, static_argnames="output", compiler_options=options)
        self._velocity = jax.jit(self._velocity_of, compiler_options=options)

    @environment.pinned()
    def noise(self, count, seed=0):
        """Draws the noise of `sample` for `count` images of a seed, float32 (count, h, w, c)."""
        return _numbers(sample.drawn_noise(self.parts.mesh, seed, count, self.image_shape))[:count]

    @environment.pinned()
    def sample(
        self, labels, noise=None, num_steps=1, omega=None, seed=0, *, output=None,
        sampler="ode", conditions=None
    ):  # fmt: skip
        """Draws images of the classes `labels`.

        Args:
          labels: (N,) or (N, K), see the class.
          noise: z_1, float (N, h, w, c); None: `noise(N, seed)`.
          num_steps: network evaluations, or the times themselves, falling from 1 to 0.
          omega: guidance scale, where it is chosen in sampling (method.name improved or flow), in
            the interval of sampling.t_min and t_max; None: that of the config, or none.
          output: `uint8`: images (N, H, W, C); `float`: the same before rounding, near [-1, 1] and
            not clipped; `latents`: x as the network gives it, (N, h, w, c), for which no
            autoencoder is needed. None: `uint8`; of values, which have no bytes, `float`.
          sampler: see `methods.sampler.integrate`.
          conditions: see the class.

        Raises:
          ValueError: an argument that does not fit; FileNotFoundError: no weights of the
            autoencoder that turns latents into images.
        """
        y = _numbers(self._labels(labels))
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed: a whole number from 0 to 2^31 - 1, got {seed}")
        outputs = OUTPUTS[self.config.dataset.float_values :]
        _one_of("output", output := output or outputs[0], outputs)
        setting = self._setting(sampler, num_steps, omega)
        z = self.noise(len(y), seed) if noise is None else noise
        z = _numbers(self._images(z, len(y), "noise"))
        vae_params = {} if output == "latents" else self.vae_params
        given, z = sample.filled_up((self._given(y, conditions), z), sample.padded(len(y)))
        arguments = self.params, vae_params, z, given, setting, np.int32(seed)
        return _numbers(self._sample(*arguments, output=output))[: len(y)]

    @environment.pinned()
    def u(self, z, t, h, y, omega=None, conditions=None):
        """Computes the average velocity over [t - h, t] at z; h = 0: the velocity v.

        Args:
          z: float (N, h, w, c).
          t, h: numbers or (N,), in [0, 1] with h <= t; t = 1 is noise, t = 0 is data.
          y: labels of z, see the class; so are conditions.
          omega: see `sample`.

        Returns:
          float32 (N, h, w, c).
        """
        y = _numbers(self._labels(y))
        z = _numbers(self._images(z, len(y), "z"))
        t, h = (np.broadcast_to(_numbers(a, np.float32), len(y)) for a in (t, h))
        if not ((0 <= h) & (h <= t) & (t <= 1)).all():
            raise ValueError(f"u: times with 0 <= h <= t <= 1, not t = {t}, h = {h}")
        given = self._given(y, conditions)
        arguments = self.params, z, t, t - h, given, self.guidance(omega)
        return _numbers(self._velocity(*arguments))

    @environment.pinned()
    def decode(self, latents):
        """Decodes latents (N, h, w, c), as `sample` gives them: images uint8 (N, H, W, C)."""
        latents = _numbers(self._images(latents, len(latents), "latents"))
        return _numbers(self._decode(self.vae_params, latents))

    @environment.pinned()
    def encode(self, images):
        """Encodes images uint8 (N, H, W, C) to latents (N, h, w, c), as records have conditions."""
        x = to_float(_numbers(images))
        return _numbers(jax.jit(self._autoencoder.encode)(self.vae_params, x)[0])

    @environment.pinned()
    def function(self, num_steps=1, omega=None, *, output="float", sampler="ode"):
        """Makes a pure function of jax, for `jit`, `grad`, `vmap` and programs of one's own.

        Args:
          num_steps, omega, sampler: as in `sample`.
          output: `float` or `latents`, as there.

        Returns:
          images(params, z, labels, vae_params=None, fresh=None, conditions=None) -> float32
          (N, H, W, C), which can be differentiated by each argument, by `labels` where they are
          weights. `params` as `Generator.params`; `z` the noise (N, h, w, c); `labels` and
          `conditions` as in `sample`, traced ones are not checked; `vae_params` as
          `Generator.vae_params`, where images of latents are asked for; `fresh` (num_steps - 1, N,
          h, w, c) the noise before each further step of the sampler `consistency`.
        """
        _one_of("output", output, OUTPUTS[1:])
        setting = self._setting(sampler, num_steps, omega)
        decode = None if output == "latents" else self._autoencoder.decode
        needs = bool(decode and self.vae_params)

        @environment.pinned()
        def images(params, z, labels, vae_params=None, fresh=None, conditions=None):
            y = self._labels(labels)
            given, z = self._given(y, conditions), self._images(z, len(y), "z")
            if needs and vae_params is None:
                raise ValueError("vae_params: images need those of the generator, model.vae_params")
            if sampler == "consistency":
                _check_shape("fresh", np.shape(fresh), (len(setting.times) - 2, *z.shape))
            x = integrate(
                self.parts.method, self.parts.net, self.parts.gather(params), z, given,
                setting.times,
                guidance=setting.guidance, sampler=sampler, fresh=lambda k: fresh[k - 1],
            )  # fmt: skip
            return decode(vae_params, x) if decode else x

        return images

    # Pure, compiled ------------------------------------------------------------------------------

    def _draw(self, params, vae_params, noise, given, setting, seed, *, output):
        index = np.arange(len(noise))
        x = sample.generate(self.parts, seed, params, index, given, setting, noise)
        if output == "latents":
            return x
        decode = self._autoencoder.finished if output == "uint8" else self._autoencoder.decode
        return decode(vae_params, x)

    def _velocity_of(self, params, z, t, r, given, guidance):
        method, net, params = self.parts.method, self.parts.net, self.parts.gather(params)
        return method.velocity(net, params, z, t, r, given, method.guidance_at(guidance, t))

    @functools.cached_property
    def _decode(self):
        return jax.jit(self._autoencoder.finished)

    @functools.cached_property
    def _autoencoder(self):
        try:
            vae = parts.load_autoencoder(self.config.dataset, self.config.sampling.vae_dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; output='latents' needs none") from None
        inherit.check_autoencoder(self.identity, vae, self._source)
        return vae

    @functools.cached_property
    def vae_params(self):
        """Returns the autoencoder's parameters on the device, a nested dict; {} without one."""
        return jax.device_put(self._autoencoder.params, self._device)

    # Arguments -----------------------------------------------------------------------------------

    def _labels(self, labels):
        labels, classes = _array(labels), self.num_classes
        if not labels.ndim or not len(labels):
            kind = "an empty list" if labels.ndim else "a single number"
            raise ValueError(f"labels: one for each image, as in [0], not {kind}")
        traced = isinstance(labels, jax.core.Tracer)
        xp = jnp if traced else np
        if labels.ndim == 1 and labels.dtype.kind in "iu":
            if not classes:
                return np.zeros(len(labels), np.int32)
            if traced or (labels.min() >= 0 and labels.max() <= classes):
                return labels.astype(np.int32)
        if labels.ndim == 2 and labels.dtype.kind in "iuf" and classes:
            missing = classes + 1 - labels.shape[1]
            if missing in (0, 1) and (traced or np.isfinite(labels).all()):
                return xp.pad(labels.astype(np.float32), ((0, 0), (0, missing)))
        kinds = f"classes 0..{classes} ({classes}: none), or finite weights (N, {classes})"
        few = labels.ndim == 1 and len(labels) <= 10
        shown = labels.tolist() if few else f"{labels.dtype} {labels.shape}"
        raise ValueError(f"labels: {kinds if classes else 'whole numbers'}, not {shown}")

    def _given(self, y, rows):
        missing, batch = given_conditions.batch_of(self.conditions, rows or {}, len(y))
        given = self.parts.codec.conditions_of(batch, missing=missing)
        return sample.conditions(np.arange(len(y)), y) | given

    def _images(self, array, count, name):
        array = _array(array)
        _check_shape(name, array.shape, (count, *self.image_shape))
        return array.astype(np.float32)

    def _setting(self, sampler, num_steps, omega):
        _one_of("sampler", sampler, SAMPLERS)
        return sample.Setting(sampler, times_of(num_steps), self.guidance(omega))

    def guidance(self, omega=None):
        """Returns the `Guidance` that `omega` stands for, see `sample`, or None."""
        if omega is None:
            return sample.guidances(self.config.sampling)[0]
        if not self.parts.method.guided_at_sampling:
            raise ValueError(
                f"omega: the guidance of method.name {self.config.method.name} is trained in; "
                "leave it out"
            )
        if not np.isscalar(omega) or not omega > 0:
            raise ValueError(f"omega must be a number above 0, got {omega!r}")
        return sample.guidances(self.config.sampling, (float(omega),))[0]


def _numbers(array, dtype=None):
    """Makes an array of numpy; raises ValueError where jax traces it."""
    try:
        return np.asarray(array, dtype)
    except jax.errors.TracerArrayConversionError:
        line = "a call of a generator gives numbers: within jit, grad or vmap use model.function()"
        raise ValueError(line) from None


def _array(array):
    return array if isinstance(array, jax.Array) else _numbers(array)


def _check_shape(name, shape, expected):
    if shape != expected:
        raise ValueError(f"{name}: {shape} instead of {expected}, one for each label")


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
