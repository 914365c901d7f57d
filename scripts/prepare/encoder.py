"""Images -> moments of latents, by the autoencoder, on all devices of this process."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from models import vae
from scripts.prepare import moments
from utils import dataset, images, sharding


class Encoder:
    """Images -> examples with the posterior moments of the VAE, on all devices of this process."""

    def __init__(self, name, size, device_batch_size, flip, store):
        autoencoder = vae.load(name)
        mesh = sharding.make_mesh(1, jax.local_devices())
        self.digest, self._name = autoencoder.identity["encoder"], name
        self.dtype, self.flips, self._size = np.dtype(store), flip, size
        self._batch_size = device_batch_size * mesh.size
        self._rows = sharding.by_row(mesh)
        self._params = jax.device_put(autoencoder.params, sharding.replicated(mesh))

        @jax.jit
        def encode(params, batch):
            with jax.default_matmul_precision("highest"):  # once for all epochs of all runs
                x = images.to_float(batch)
                views = {"moments": x} | ({"moments_flipped": x[:, :, ::-1]} if flip else {})
                return {
                    key: jnp.concatenate(autoencoder.encode(params, view), axis=-1)
                    for key, view in views.items()
                }

        self._encode = encode
        spec = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        self.shape = jax.eval_shape(encode, autoencoder.params, spec)["moments"].shape[1:]
        self._spread, self._error = moments.Spread(), 0.0

    def __call__(self, stream):
        """Encodes (image or None, label): yields examples or None, a batch ahead of the reading."""
        waiting = collections.deque()
        while rows := list(itertools.islice(stream, self._batch_size)):
            batch = np.zeros((self._batch_size, self._size, self._size, 3), np.uint8)
            for i, (image, _) in enumerate(rows):
                if image is not None:
                    batch[i] = image
            waiting.append((rows, self._encode(self._params, jax.device_put(batch, self._rows))))
            if len(waiting) > 1:
                yield from self._examples(*waiting.popleft())
        while waiting:
            yield from self._examples(*waiting.popleft())

    def _examples(self, rows, encoded):
        encoded = jax.device_get(encoded)
        for i, (image, label) in enumerate(rows):
            if image is None:
                yield None
                continue
            where = f"dataset.vae {self._name}, an image of class {label}"
            stored = {k: moments.check(where, v[i], self.dtype) for k, v in encoded.items()}
            self._measure(encoded["moments"][i], stored["moments"])
            yield dataset.example(label, **stored)

    def _measure(self, exact, stored):
        mean, rounded = (np.split(a.astype(np.float64), 2, axis=-1)[0] for a in (exact, stored))
        self._spread.add(exact)
        self._error += ((mean - rounded) ** 2).sum()

    def report(self):
        """Says how the latents lie, and what the storage cost, relative to their deviation."""
        self._spread.report()
        if self._spread.count and self.dtype != np.float32:
            error = np.sqrt(self._error / self._spread.count) / self._spread.std()
            print(f"{self.dtype} storage: rms error {error:.1e} of the latents' standard deviation")
