"""Generated images -> features -> FID and its relatives; also the evaluation job.

noise -> latents -> images -> uint8 -> features -> moments is one compiled function over all
devices. Only moments come to the host (features too, where precision and recall ask for them).
"""

import contextlib
import json
import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import sample
import score
from models import dit, meanflow
from utils import checkpoint, dataset, metric_writer, processes, sharding


class Evaluator:
    """Measures weights: generates images and scores them. Compiles when first called.

    Args:
      net: function (params, z, t, h, y) -> u.
      autoencoder: from `models.vae.load`.
      scorer: `score.Scorer`.
      shape: (h, w, c) of what the network sees.
      num_classes: classes of the labels.
      seed: of noise and labels.
      network_dtype: type of the network's products, for the results alone.
    """

    def __init__(self, net, autoencoder, scorer, *, shape, num_classes, seed, network_dtype):
        self.scorer, options, mesh = scorer, scorer.options, scorer.mesh
        self.described = {
            "num_samples": options.num_samples,
            "labels": options.labels,
            "seed": seed,
            "network_dtype": network_dtype,
            "vae_dtype": autoencoder.dtype,
        }
        self._vae_params = sharding.place_everywhere(mesh, autoencoder.params)
        rows = sharding.by_row(mesh)

        def add_generated(statistics, params, vae_params, feature_params, start, times):
            index = jax.lax.with_sharding_constraint(start + jnp.arange(scorer.batch_size), rows)
            labels = sample.draw_labels(seed, index, num_classes, options.labels)
            images = sample.generate(
                net, autoencoder.decode, params, vae_params, index, labels, times,
                seed=seed, shape=shape,
            )  # fmt: skip
            return scorer.add(statistics, feature_params, images, index, options.num_samples)

        self._add_generated = jax.jit(
            add_generated, out_shardings=sharding.replicated(mesh), donate_argnums=0
        )

    def __call__(self, params, times):
        """Metrics of images of the weights `params` in steps over `times`: name -> float."""
        scorer, count = self.scorer, self.scorer.options.num_samples
        scorer.reference()
        statistics, kept = scorer.empty(), []
        for start in scorer.starts(count, "evaluate"):
            sharding.hold_back(scorer.mesh, statistics)
            statistics, pool = self._add_generated(
                statistics, params, self._vae_params, scorer.feature_params, np.int32(start), times
            )
            kept.append(jax.device_get(pool))
        return scorer.compare(statistics, kept, count)


def run(evaluator, weights, sampling, workdir):
    """The evaluation job: every set of weights in every number of steps, as a table and a file.

    Args:
      weights: as from `sample.load_weights`, on the devices.
      sampling: the options `sampling`.
      workdir: results.json is written there, added to what it holds, result by result.

    Returns:
      The results, a list of dicts.
    """
    results = []
    for name in evaluator.scorer.options.weights:
        params = sample.choose_weights(weights, name)
        about = {
            "weights": name,
            "weights_checksum": f"{checkpoint.checksums({'params': params}, {})['params']:08x}",
            "checkpoint_step": weights["step"],
        }
        for num_steps in (0,) if sampling.sampling_timesteps else sampling.num_steps:
            times = meanflow.sample_times(num_steps, sampling.sampling_timesteps)
            found = evaluator(params, times)
            results.append(describe(evaluator, about, times, found))
            logging.info("%s", report(results[-1]))
            save_results(workdir, results[-1:])  # one that is stopped keeps what it has measured
    if len(results) > 1:
        logging.info("%s", table(results))
    return results


def describe(evaluator, weights, times, metrics):
    """One entry of results.json: the metrics and all that they depend on."""
    described = {
        **evaluator.scorer.describe(),
        **evaluator.described,
        **weights,
        "num_steps": len(times) - 1,
        "sampling_times": [round(float(t), 6) for t in times],
    }
    assert not metrics.keys() & described.keys()
    return metrics | described


def report(result):
    """One result as a line for people."""
    numbers = ", ".join(f"{k} {v:.4f}" for k, v in result.items() if isinstance(v, float))
    return (
        f"{numbers} ({result['weights']}, {result['num_steps']}-step, "
        f"{result['num_samples']} samples, {result['evaluator']}, "
        f"checkpoint {result['checkpoint_step']})"
    )


def metric_name(weights, num_steps):
    """What follows `fid/` and the others in the name of a metric: "ema_1step"."""
    return f"{weights}_{num_steps}step"


def scalars(results):
    """Results as the log has them: {"fid/ema_1step": 11.3, ...}."""
    named = {}
    for result in results:
        name = metric_name(result["weights"], result["num_steps"])
        named |= {f"{k}/{name}": v for k, v in result.items() if isinstance(v, float)}
    return named


def table(results):
    """Several results as a table for people: a line for each set of weights and steps."""
    metrics = [name for name, value in results[0].items() if isinstance(value, float)]
    lines = [["weights", "steps", *metrics]]
    for result in results:
        steps = str(result["num_steps"])
        lines.append([result["weights"], steps, *(f"{result[name]:.4f}" for name in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def save_results(workdir, results):
    """Adds results to WORKDIR/results.json, which is a list; the file is never half-written.

    A result takes the place of one of the same evaluation, as an interrupted run repeats it.
    """
    if not processes.is_writer():
        return
    path = pathlib.Path(workdir) / "results.json"
    known = json.loads(path.read_text()) if path.exists() else []
    known = [old for old in known if not any(_is_same(old, new) for new in results)]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(known + results, indent=1) + "\n")
    os.replace(unfinished, path)


def _is_same(old, new):
    """Whether two entries of results.json depend on the same; the metrics are their floats."""

    def described(result):
        return {name: value for name, value in result.items() if not isinstance(value, float)}

    return described(old) == described(new)


# From a config -------------------------------------------------------------------------------


def make_evaluator(config, mesh, net, autoencoder, records):
    """The evaluator of a config; `records` are the training images, or None."""
    shape = sample.image_shape(config)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    images = jax.eval_shape(autoencoder.decode, autoencoder.params, x)
    features = score.load_features(config.fid)
    return Evaluator(
        dit.as_function(net, sharding.gather(mesh)),
        autoencoder,
        score.Scorer(features, mesh, config.fid, images.shape[1:], records),
        shape=shape,
        num_classes=config.dataset.num_classes,
        seed=config.sampling.seed,
        network_dtype=sample.network_dtype(config),
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
    results = run(evaluator, weights, config.sampling, workdir)
    # Beside the log of a run in the same folder, which is not to be added to.
    writer = metric_writer.MetricWriter(
        pathlib.Path(workdir) / "evaluation",
        enabled=processes.is_writer(),
        wandb_project=config.training.wandb,
    )
    with contextlib.closing(writer):
        writer.scalars(weights["step"], scalars(results))
