"""Images -> features -> statistics, on all devices.

Features and their moments are computed where the images are; only moments come to the host
(features too, where precision and recall ask for them). Builds on metrics/distances.py,
metrics/inception.py, utils/processes.py and utils/sharding.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metrics import distances, inception
from utils import processes, sharding

SPATIAL = 2023  # features of sFID
SPLITS = 10  # of the Inception score
# What `fid.metrics` may ask for -> the names of its numbers in the results.
METRICS = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "inception_score": ("inception_score", "inception_score_std"),
    "precision_recall": ("precision", "recall"),
}
NUMBERS = tuple(name for names in METRICS.values() for name in names)


def check_options(options):
    """Raises ValueError where the options `fid` name no metric or feature network there is."""
    if not options.metrics or not set(options.metrics) <= METRICS.keys():
        raise ValueError(f"fid.metrics are of {' | '.join(METRICS)}, got {list(options.metrics)}")
    for name, choices in (("features", ("inception", "pixels")), ("resize", inception.RESIZES)):
        if options[name] not in choices:
            raise ValueError(f"fid.{name} is one of {' | '.join(choices)}, not {options[name]!r}")
    if options.features == "pixels" and set(options.metrics) != {"fid"}:
        raise ValueError("fid.metrics: fid.features: pixels has no other metric than fid")


class Statistics(NamedTuple):
    """Accumulators of one set of images; None for what is not asked for."""

    pool: distances.Moments
    spatial: distances.Moments | None
    scores: distances.Scores | None


def init_statistics(metrics, dim):
    """Empty accumulators for the metrics by name, on features of `dim` numbers."""
    return Statistics(
        pool=distances.init_moments(dim),
        spatial=distances.init_moments(SPATIAL) if "sfid" in metrics else None,
        scores=distances.init_scores(SPLITS) if "inception_score" in metrics else None,
    )


def add_features(statistics, features, index, num_samples):
    """Adds the features of images number `index` (N,); those from `num_samples` on do not count."""
    weight = (index < num_samples).astype(jnp.float32)
    pool, spatial, scores = statistics
    pool = distances.add_moments(pool, features["pool"], weight)
    if spatial is not None:
        spatial = distances.add_moments(spatial, features["spatial"], weight)
    if scores is not None:
        # parts [k n // SPLITS, (k + 1) n // SPLITS), as distances.inception_score cuts them
        split = ((jnp.minimum(index, num_samples - 1) + 1) * SPLITS - 1) // num_samples
        scores = distances.add_scores(scores, features["logits_no_bias"], split, weight)
    return Statistics(pool, spatial, scores)


class Scorer:
    """Gathers the statistics of sets of images. Compiles when first used.

    Args:
      features: from `metrics.features.load`.
      mesh: devices.
      options: the options `fid`.
      image_shape: (H, W, C) of the images.
    """

    def __init__(self, features, mesh, options, image_shape):
        self.features, self.mesh, self.options = features, mesh, options
        self.image_shape = image_shape
        self.batch_size = options.device_batch_size * mesh.size
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
        self.dim = jax.eval_shape(features.apply, features.params, image)["pool"].shape[-1]
        self._add = jax.jit(
            self.add, out_shardings=sharding.replicated(mesh), donate_argnums=0, static_argnums=4
        )

    @functools.cached_property
    def feature_params(self):
        """The parameters of the feature network, on every device."""
        return sharding.place_everywhere(self.mesh, self.features.params)

    def empty(self):
        """Statistics of no images, on the devices."""
        return sharding.place_everywhere(self.mesh, init_statistics(self.options.metrics, self.dim))

    def add(self, statistics, feature_params, images, index, num_samples):
        """Adds images uint8 (N, H, W, C) number `index` (N,) of `num_samples`. Pure, for `jit`.

        Returns:
          The statistics, and the pool features (N, D) where precision and recall need them.
        """
        found = self.features.apply(feature_params, images)
        statistics = add_features(statistics, found, index, num_samples)
        return statistics, found["pool"] if "precision_recall" in self.options.metrics else None

    def starts(self, count, name):
        """Numbers of the first images of the batches that make up `count`, with a progress bar.

        Raises:
          Preempted: the job is asked to stop; a measurement is begun anew later.
        """
        starts, shown = range(0, count, self.batch_size), processes.is_writer()
        for start in processes.progress(starts, len(starts), "batches", name, shown):
            processes.check_stop()
            yield start

    def read(self, read, count, name):
        """Statistics of `count` images on the host; `read(index)` gives those number (N,)."""
        rows = sharding.by_row(self.mesh)
        statistics, kept = self.empty(), []
        for start in self.starts(count, name):
            index = start + np.arange(self.batch_size, dtype=np.int32)
            images = sharding.place((read(np.minimum(index, count - 1)), index), (rows, rows))
            sharding.hold_back(self.mesh, statistics)
            statistics, pool = self._add(statistics, self.feature_params, *images, count)
            kept.append(jax.device_get(pool))
        return statistics, kept

    def describe(self):
        """What the numbers depend on, beside the images and the reference."""
        return {
            "evaluator": self.features.name,
            "resize": self.features.resize,
            "feature_weights_sha256": self.features.weights_sha256,
        }
