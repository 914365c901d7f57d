"""Images -> features -> FID and its relatives, on all devices.

Features and their moments are computed where the images are; only moments come to the host
(features too, where precision and recall ask for them).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import inception, inception_weights
from utils import fid, processes, sharding

SPATIAL = 2023  # features of sFID
SPLITS = 10  # of the Inception score


class Features(NamedTuple):
    """What turns images into numbers; `name` says which evaluator a result belongs to."""

    name: str
    params: dict
    apply: Callable  # (params, images uint8 (N, H, W, C)) -> {"pool": (N, D), ...}
    resize: str | None
    weights_sha256: str | None


def load_features(options):
    """The feature network that the options `fid` name.

    Raises:
      ValueError, FileNotFoundError: no weights, or damaged ones.
    """
    if options.features == "pixels":
        return Features("pixels in [0, 1]", {}, pixel_features, None, None)
    params = inception_weights.load(options.inception_weights or None)

    def apply(params, images):
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        return inception.features(params, images, options.resize)

    name = f"Inception 2015-12-05, {options.resize} resize"
    return Features(name, params, apply, options.resize, inception_weights.digest(params))


def pixel_features(params, images):
    """The pixels in [0, 1] as they are, float32 (N, H W C)."""
    return {"pool": images.reshape(len(images), -1).astype(jnp.float32) / 255}


class Statistics(NamedTuple):
    """Accumulators of one set of images; None for what is not asked for."""

    pool: fid.Moments
    spatial: fid.Moments | None
    scores: fid.Scores | None


def init_statistics(metrics, dim):
    """Empty accumulators for the metrics by name, on features of `dim` numbers."""
    return Statistics(
        pool=fid.init_moments(dim),
        spatial=fid.init_moments(SPATIAL) if "sfid" in metrics else None,
        scores=fid.init_scores(SPLITS) if "inception_score" in metrics else None,
    )


def add_features(statistics, features, index, num_samples):
    """Adds the features of images number `index` (N,); those from `num_samples` on do not count."""
    weight = (index < num_samples).astype(jnp.float32)
    pool, spatial, scores = statistics
    pool = fid.add_moments(pool, features["pool"], weight)
    if spatial is not None:
        spatial = fid.add_moments(spatial, features["spatial"], weight)
    if scores is not None:
        # parts [k n // SPLITS, (k + 1) n // SPLITS), as utils.fid.inception_score cuts them
        split = ((jnp.minimum(index, num_samples - 1) + 1) * SPLITS - 1) // num_samples
        scores = fid.add_scores(scores, features["logits_no_bias"], split, weight)
    return Statistics(pool, spatial, scores)


class Scorer:
    """Compares sets of images with a reference. Compiles when first used.

    Args:
      features: from `load_features`.
      mesh: devices.
      options: the options `fid`.
      image_shape: (H, W, C) of the images.
      records: `Records` of images, for which the reference statistics are computed where
        `options.cache_ref` is empty; or None.

    Raises:
      ValueError, FileNotFoundError: options that do not fit together, or no reference.
    """

    def __init__(self, features, mesh, options, image_shape, records=None):
        check_options(options, records)
        if options.features == "pixels" and not options.cache_ref and image_shape != records.shape:
            raise ValueError(f"images are {image_shape}, those of {records.root} {records.shape}")
        self.features, self.mesh, self.options, self.records = features, mesh, options, records
        self.batch_size = options.device_batch_size * mesh.size
        self.feature_params = sharding.place_everywhere(mesh, features.params)
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
        self._dim = jax.eval_shape(features.apply, features.params, image)["pool"].shape[-1]
        self._reference = None
        if options.cache_ref:
            self._reference = fid.load_reference(options.cache_ref)
            check_reference(options, features, self._reference, self._dim)
        self._add = jax.jit(
            self.add, out_shardings=sharding.replicated(mesh), donate_argnums=0, static_argnums=4
        )

    def empty(self):
        """Statistics of no images, on the devices."""
        return sharding.place_everywhere(
            self.mesh, init_statistics(self.options.metrics, self._dim)
        )

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

    def reference(self):
        """The reference as `utils.fid.load_reference` returns it, with `pool` features if asked."""
        if self._reference is None:
            count = self.records.num_records
            statistics, kept = self.read(
                lambda index: self.records.read(index)["image"], count, "reference"
            )
            mu, sigma = fid.finish_moments(statistics.pool)
            self._reference = {"mu": mu, "sigma": sigma}
            if statistics.spatial is not None:
                spatial = fid.finish_moments(statistics.spatial)
                self._reference |= dict(zip(("mu_s", "sigma_s"), spatial, strict=True))
            if "precision_recall" in self.options.metrics:
                self._reference["pool"] = np.concatenate(kept)[:count]
        return self._reference

    def compare(self, statistics, kept, count):
        """Metrics of `count` images from their statistics and kept features: name -> float."""
        reference, metrics, results = self.reference(), self.options.metrics, {}
        if "fid" in metrics:
            moments = fid.finish_moments(statistics.pool)
            results["fid"] = fid.frechet_distance(*moments, reference["mu"], reference["sigma"])
        if "sfid" in metrics:
            moments = fid.finish_moments(statistics.spatial)
            results["sfid"] = fid.frechet_distance(
                *moments, reference["mu_s"], reference["sigma_s"]
            )
        if "inception_score" in metrics:
            scores = fid.finish_scores(statistics.scores)
            results |= dict(zip(("inception_score", "inception_score_std"), scores, strict=True))
        if "precision_recall" in metrics:
            found = fid.precision_recall(reference["pool"], np.concatenate(kept)[:count])
            results |= dict(zip(("precision", "recall"), found, strict=True))
        return results

    def describe(self):
        """What the numbers depend on, beside the images."""
        return {
            "evaluator": self.features.name,
            "resize": self.features.resize,
            "feature_weights_sha256": self.features.weights_sha256,
            "reference": self.options.cache_ref or str(self.records.root),
        }


def check_options(options, records):
    """Raises ValueError where the options `fid` do not fit together, or there is no reference."""
    if options.features == "pixels" and set(options.metrics) != {"fid"}:
        raise ValueError("fid.metrics: fid.features: pixels has no other metric than fid")
    if not options.cache_ref and (records is None or records.key != "image"):
        raise ValueError(
            "fid.cache_ref: no reference statistics, and no training images to compute them from; "
            "give the npz, or switch fid.on_training off"
        )
    if "precision_recall" in options.metrics and options.cache_ref:
        raise ValueError(
            "fid.metrics: precision_recall needs the features of the reference images; "
            "leave fid.cache_ref empty, and with eval_only let dataset.root name records of images "
            "(scripts.prepare_dataset images --vae=none)"
        )


def check_reference(options, features, reference, dim):
    """Raises ValueError where reference statistics belong to another evaluator."""
    where = f"fid.cache_ref: {options.cache_ref}"
    if len(reference["mu"]) != dim:
        raise ValueError(
            f"{where} describes {len(reference['mu'])} features, {features.name} has {dim}"
        )
    if reference["resize"] not in (None, features.resize):
        raise ValueError(
            f"{where} was made with {reference['resize']} resize, fid.resize is {features.resize}"
        )
    if "sfid" in options.metrics and reference["mu_s"] is None:
        raise ValueError(f"{where} holds no spatial statistics (mu_s, sigma_s) for sfid")
