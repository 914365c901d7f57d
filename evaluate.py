"""Generated images -> features -> FID and its relatives; also the evaluation job.

noise -> latents -> images -> uint8 -> features -> moments is one compiled function over all
devices. Only moments come to the host (features too, where precision and recall ask for them).
"""

import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import sample
from models import dit, inception, inception_weights, meanflow
from utils import dataset, fid, processes, sharding

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
        split = jnp.minimum(index, num_samples - 1) * SPLITS // num_samples
        scores = fid.add_scores(scores, features["logits"], split, weight)
    return Statistics(pool, spatial, scores)


class Evaluator:
    """Measures weights against reference statistics. Compiles when first called.

    Args:
      net: function (params, z, t, h, y) -> u.
      autoencoder: from `models.vae.load`.
      features: from `load_features`.
      mesh: devices.
      options: the options `fid`.
      shape: (h, w, c) of what the network sees.
      num_classes: classes of the labels.
      seed: of noise and labels.
      records: `Records` of the training images, for which the reference statistics are computed
        where `options.cache_ref` is empty; or None.

    Raises:
      ValueError, FileNotFoundError: options that do not fit together, or no reference.
    """

    def __init__(
        self, net, autoencoder, features, mesh, options, *, shape, num_classes, seed, records
    ):
        check_options(options, records)
        self.options, self.mesh, self.features, self.records = options, mesh, features, records
        self.batch_size = options.device_batch_size * mesh.size
        everywhere = sharding.replicated(mesh)
        self._vae_params = sharding.place_everywhere(mesh, autoencoder.params)
        self._feature_params = sharding.place_everywhere(mesh, features.params)
        self._reference = fid.load_reference(options.cache_ref) if options.cache_ref else None
        rows = sharding.by_row(mesh)

        def add_images(statistics, feature_params, images, index, num_samples):
            found = features.apply(feature_params, images)
            statistics = add_features(statistics, found, index, num_samples)
            return statistics, found["pool"] if "precision_recall" in options.metrics else None

        def add_generated(statistics, params, vae_params, feature_params, start, times):
            index = jax.lax.with_sharding_constraint(start + jnp.arange(self.batch_size), rows)
            labels = sample.draw_labels(seed, index, num_classes, options.labels)
            images = sample.generate(
                net, autoencoder.decode, params, vae_params, index, labels, times,
                seed=seed, shape=shape,
            )  # fmt: skip
            return add_images(statistics, feature_params, images, index, options.num_samples)

        jit = dict(out_shardings=everywhere, donate_argnums=0)
        self._add_images = jax.jit(add_images, static_argnums=4, **jit)
        self._add_generated = jax.jit(add_generated, **jit)
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        image = jax.eval_shape(autoencoder.decode, autoencoder.params, x)
        image = jax.ShapeDtypeStruct(image.shape, jnp.uint8)
        self._dim = jax.eval_shape(features.apply, features.params, image)["pool"].shape[-1]

    def _empty(self):
        return sharding.place_everywhere(
            self.mesh, init_statistics(self.options.metrics, self._dim)
        )

    def _starts(self, count, name):
        starts = range(0, count, self.batch_size)
        return tqdm(starts, name, unit="batch", leave=False, disable=sample.quiet())

    def generated(self, params, times):
        """Statistics, and pool features if asked for, of `options.num_samples` images."""
        statistics, kept = self._empty(), []
        for start in self._starts(self.options.num_samples, "evaluate"):
            processes.check_stop()
            statistics, pool = self._add_generated(
                statistics, params, self._vae_params, self._feature_params, np.int32(start), times
            )
            kept.append(jax.device_get(pool))
        return statistics, kept

    def reference(self):
        """The reference, as `utils.fid.load_reference` returns it, and pool features if asked."""
        if self._reference is None:
            count, rows = self.records.num_records, sharding.by_row(self.mesh)
            statistics, kept = self._empty(), []
            for start in self._starts(count, "reference"):
                processes.check_stop()
                index = start + np.arange(self.batch_size, dtype=np.int32)
                images = self.records.read(np.minimum(index, count - 1))["image"]
                images, index = sharding.place((images, index), (rows, rows))
                statistics, pool = self._add_images(
                    statistics, self._feature_params, images, index, count
                )
                kept.append(jax.device_get(pool))
            mu, sigma = fid.finish_moments(statistics.pool)
            self._reference = {"mu": mu, "sigma": sigma, "mu_s": None, "resize": None}
            if statistics.spatial is not None:
                spatial = fid.finish_moments(statistics.spatial)
                self._reference |= dict(zip(("mu_s", "sigma_s"), spatial, strict=True))
            if "precision_recall" in self.options.metrics:
                self._reference["pool"] = np.concatenate(kept)[:count]
        return self._reference

    def __call__(self, params, times):
        """Metrics of images of the weights `params` in steps over `times`: name -> float."""
        reference = self.reference()
        statistics, kept = self.generated(params, times)
        metrics, results = self.options.metrics, {}
        if "fid" in metrics:
            moments = fid.finish_moments(statistics.pool)
            results["fid"] = fid.frechet_distance(*moments, reference["mu"], reference["sigma"])
        if "sfid" in metrics:
            if reference["mu_s"] is None:
                raise ValueError(f"{self.options.cache_ref} holds no statistics for sfid (mu_s)")
            moments = fid.finish_moments(statistics.spatial)
            results["sfid"] = fid.frechet_distance(
                *moments, reference["mu_s"], reference["sigma_s"]
            )
        if "inception_score" in metrics:
            scores = fid.finish_scores(statistics.scores)
            results |= dict(zip(("inception_score", "inception_score_std"), scores, strict=True))
        if "precision_recall" in metrics:
            pool = np.concatenate(kept)[: self.options.num_samples]
            found = fid.precision_recall(reference["pool"], pool)
            results |= dict(zip(("precision", "recall"), found, strict=True))
        return results


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
            "leave fid.cache_ref empty and give dataset.root"
        )


def run(evaluator, weights, decays, sampling, workdir):
    """The evaluation job: every set of weights in every number of steps, as a table and a file.

    Args:
      weights: `step`, `params` and `ema_params`, as from `sample.load_weights`, on the devices.
      decays: of the averages, `training.ema_val`.
      sampling: the options `sampling`.
      workdir: results.json is written there, added to what it holds.

    Returns:
      The results, a list of dicts.
    """
    results = []
    for name in evaluator.options.weights:
        params = sample.choose_weights(weights, name, decays)
        for num_steps in (0,) if sampling.sampling_timesteps else sampling.num_steps:
            times = meanflow.sample_times(num_steps, sampling.sampling_timesteps)
            found = evaluator(params, times)
            results.append(describe(evaluator, weights["step"], name, times, sampling.seed, found))
            logging.info("%s", report(results[-1]))
    save_results(workdir, results)
    return results


def describe(evaluator, step, weights, times, seed, metrics):
    """One entry of results.json: the metrics and all that they depend on."""
    options = evaluator.options
    return {
        **metrics,
        "evaluator": evaluator.features.name,
        "resize": evaluator.features.resize,
        "feature_weights_sha256": evaluator.features.weights_sha256,
        "reference": options.cache_ref or str(evaluator.records.root),
        "num_samples": options.num_samples,
        "labels": options.labels,
        "seed": seed,
        "weights": weights,
        "checkpoint_step": step,
        "sampling_times": [round(float(t), 6) for t in times],
    }


def report(result):
    """One result as a line for people."""
    numbers = ", ".join(f"{k} {v:.4f}" for k, v in result.items() if isinstance(v, float))
    steps = len(result["sampling_times"]) - 1
    return (
        f"{numbers} ({result['weights']}, {steps}-step, {result['num_samples']} samples, "
        f"{result['evaluator']}, checkpoint {result['checkpoint_step']})"
    )


def save_results(workdir, results):
    """Adds results to WORKDIR/results.json, which is a list; the file is never half-written."""
    if not processes.is_writer():
        return
    path = pathlib.Path(workdir) / "results.json"
    known = json.loads(path.read_text()) if path.exists() else []
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(known + results, indent=1) + "\n")
    os.replace(unfinished, path)


# From a config -------------------------------------------------------------------------------


def make_evaluator(config, mesh, net, autoencoder, records):
    """The evaluator of a config; `records` are the training images, or None."""
    return Evaluator(
        dit.as_function(net),
        autoencoder,
        load_features(config.fid),
        mesh,
        config.fid,
        shape=sample.image_shape(config),
        num_classes=config.dataset.num_classes,
        seed=config.sampling.seed,
        records=records,
    )


def evaluate_job(config, workdir):
    """Evaluates `load_from`, or the run in `workdir`; with `fid.cache_ref` it needs no data."""
    mesh = sharding.make_mesh(config.mesh.fsdp)
    net, shape = sample.make_net(config), sample.image_shape(config)
    shapes = jax.eval_shape(lambda: dit.init_params(net, jax.random.key(0), shape))
    weights = sample.load_weights(config.load_from or workdir, shapes)
    weights = sample.place_weights(weights, mesh)
    records = None if config.fid.cache_ref else dataset.open_records(config.dataset.root)
    evaluator = make_evaluator(config, mesh, net, sample.make_autoencoder(config), records)
    run(evaluator, weights, config.training.ema_val, config.sampling, workdir)
