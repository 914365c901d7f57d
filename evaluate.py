"""Generated images -> features -> FID and its relatives; also the evaluation job.

noise -> latents -> images -> uint8 -> features -> moments is one compiled function over all
devices, `Evaluator.step`: the one that runs, is measured and is compiled ahead.
"""

import contextlib
import functools
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import inherit
import parts
import sample
import weights as weights_of
from methods import path
from metrics import features, reference, scorer
from utils import (
    checkpoint,
    dataset,
    environment,
    files,
    locks,
    metric_writer,
    processes,
    sharding,
)


class Evaluator:
    """Measures weights: generates images and scores them. Compiles when first called.

    Args:
      model: `parts.Parts`.
      autoencoder: from `models.vae.load`.
      score: `metrics.scorer.Scorer`.
      options: the options `sampling`.
    """

    def __init__(self, model, autoencoder, score, options):
        self.model, self.autoencoder, self.score, self.options = model, autoencoder, score, options
        self.step = jax.jit(
            self.add_generated, out_shardings=sharding.replicated(model.mesh), donate_argnums=0
        )

    @functools.cached_property
    def vae_params(self):
        """The parameters of the autoencoder, on every device."""
        return sharding.place_everywhere(self.model.mesh, self.autoencoder.params)

    def images(self, params, vae_params, start, times, guidance, decode):
        """A batch of images number `start` and on, by the function `decode`, and their numbers."""
        rows = sharding.by_row(self.model.mesh)
        index = start + jnp.arange(self.score.batch_size)
        index = jax.lax.with_sharding_constraint(index, rows)
        kind = self.score.options.labels
        labels = sample.draw_labels(self.options.seed, index, self.model.num_classes, kind)
        generated = sample.generate(
            self.model, self.options, decode, params, vae_params, index, labels, times, guidance
        )
        return generated, index

    def add_generated(self, statistics, params, vae_params, feature_params, start, times, guidance):
        """Adds a batch of generated images to the statistics. Pure; see `Scorer.add`."""
        decode = self.autoencoder.decode
        images, index = self.images(params, vae_params, start, times, guidance, decode)
        count = self.score.options.num_samples
        return self.score.add(statistics, feature_params, images, index, count)

    def __call__(self, params, times, guidance=None):
        """Statistics of images of the weights `params` in steps over `times`, see `Scorer.read`."""
        score = self.score
        statistics, kept = score.empty(), []
        for start in score.starts(score.options.num_samples, "evaluate"):
            sharding.hold_back(score.mesh, statistics)
            statistics, pool = self.step(
                statistics, params, self.vae_params, score.feature_params, np.int32(start), times,
                guidance,
            )  # fmt: skip
            kept.append(jax.device_get(pool))
        return statistics, kept


class Evaluation:
    """Everything that turns weights into results: generator, evaluator and reference of a config.

    Args:
      config: the whole config.
      model: `parts.Parts`.
      autoencoder: from `models.vae.load`.
      records: the training images, or None.
    """

    def __init__(self, config, model, autoencoder, records):
        self.sampling, self.fid = config.sampling, config.fid
        x = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
        images = jax.eval_shape(autoencoder.decode, autoencoder.params, x)
        score = scorer.Scorer(features.load(self.fid), model.mesh, self.fid, images.shape[1:])
        self.reference = reference.Reference(self.fid, score, records)
        self.evaluator = Evaluator(model, autoencoder, score, self.sampling)
        self.described = {
            "num_samples": self.fid.num_samples,
            "labels": self.fid.labels,
            "seed": self.sampling.seed,
            "network_dtype": parts.network_dtype(config),
            "vae_dtype": autoencoder.dtype,
            "decoder": autoencoder.identity.get("decoder"),
            "options": inherit.digest(config),
            "environment": environment.describe(),
        }

    def run(self, weights, workdir):
        """The evaluation job: every set of weights, number of steps and guidance.

        Args:
          weights: as from `weights.load`, on the devices.
          workdir: results.json is written there, added to what it holds, result by result.

        Returns:
          The results, a list of dicts.
        """
        results, steps = [], self.sampling.num_steps
        for name in self.fid.weights:
            params = weights_of.choose(weights, name)
            about = {
                "weights": name,
                "weights_checksum": f"{checkpoint.checksums({'params': params}, {})['params']:08x}",
                "checkpoint_step": weights["step"],
            }
            for num_steps in (0,) if self.sampling.sampling_timesteps else steps:
                times = path.sample_times(num_steps, self.sampling.sampling_timesteps)
                for guidance in sample.guidances(self.sampling):
                    results.append(self.measure(params, about, times, guidance))
                    logging.info("%s", report(results[-1]))
                    save_result(workdir, results[-1])  # one that is stopped keeps what it has
        if len(results) > 1:
            logging.info("%s", table(results))
        compared = [result for result in results if "fid" in result]
        if len(compared) > 1:
            best = min(compared, key=lambda result: result["fid"])
            logging.info("best: %s", report(best))
        return results

    def measure(self, params, about, times, guidance):
        """One entry of results.json: the metrics and all that they depend on."""
        self.reference.statistics()  # before hours of images
        found = self.evaluator(params, times, guidance)
        metrics = self.reference.compare(*found, self.fid.num_samples)
        described = {
            **self.evaluator.score.describe(),
            **self.reference.describe(),
            **self.described,
            **about,
            "num_steps": len(times) - 1,
            "sampling_times": [round(float(t), 6) for t in times],
        }
        if self.sampling.method != "ode":
            described["sampling_method"] = self.sampling.method
        if guidance is not None:
            described |= {name: round(float(x), 6) for name, x in guidance._asdict().items()}
        return metrics | described


def numbers(result):
    """The metrics of a result, name -> float; everything else says what they depend on."""
    return {name: result[name] for name in scorer.NUMBERS if name in result}


def guidance_of(result):
    """The guidance of a result, where there was one: name -> float."""
    return {name: result[name] for name in ("omega", "t_min", "t_max") if name in result}


def report(result):
    """One result as a line for people."""
    found = ", ".join(f"{name} {value:.4f}" for name, value in numbers(result).items())
    guidance = "".join(f"{name} {value:g}, " for name, value in guidance_of(result).items())
    return (
        f"{found} ({result['weights']}, {result['num_steps']}-step, {guidance}"
        f"{result['num_samples']} samples, {result['evaluator']}, "
        f"checkpoint {result['checkpoint_step']})"
    )


def metric_name(result):
    """What follows `fid/` and the others in the name of a metric: "ema_1step"."""
    guidance = [f"{name}{value:g}" for name, value in guidance_of(result).items()]
    return "_".join([result["weights"], f"{result['num_steps']}step", *guidance])


def scalars(results):
    """Results as the log has them: {"fid/ema_1step": 11.3, ...}."""
    return {
        f"{name}/{metric_name(result)}": value
        for result in results
        for name, value in numbers(result).items()
    }


def table(results):
    """Several results as a table for people: a line for each set of weights and steps."""
    lines = [["weights", "steps", *guidance_of(results[0]), *numbers(results[0])]]
    for result in results:
        guidance = [f"{value:g}" for value in guidance_of(result).values()]
        found = [f"{value:.4f}" for value in numbers(result).values()]
        lines.append([result["weights"], str(result["num_steps"]), *guidance, *found])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def save_result(workdir, result):
    """Adds a result to WORKDIR/results.json, which is a list; the file is never half-written.

    It takes the place of one of the same evaluation, as an interrupted run repeats it.
    """
    if not processes.is_writer():
        return
    file = pathlib.Path(workdir) / "results.json"
    with locks.alone(file):
        known = json.loads(file.read_text()) if file.exists() else []
        known = [old for old in known if _depends_on(old) != _depends_on(result)]
        files.write_text(file, json.dumps([*known, result], indent=1) + "\n")


def _depends_on(result):
    return {name: value for name, value in result.items() if name not in scorer.NUMBERS}


def evaluate_job(config, workdir):
    """Evaluates `load_from`, or the run in `workdir`; with `fid.cache_ref` it needs no data."""
    model = parts.make(config)
    where = config.load_from or workdir
    weights = weights_of.load(
        where, model.param_shapes(), config, may_lack=model.module.only_for_training
    )
    inherit.check(config, weights, where)
    for name in config.fid.weights:
        weights_of.choose(weights, name)  # a name that is not there is told before hours of images
    weights = weights_of.place(weights, model.mesh)
    autoencoder = parts.load_autoencoder(config)
    inherit.check_autoencoder(weights, autoencoder, where)
    records = None if config.fid.cache_ref else dataset.open_records(config.dataset.root)
    evaluation = Evaluation(config, model, autoencoder, records)
    results = evaluation.run(weights, workdir)
    # Beside the log of a run in the same folder, which is not to be added to.
    writer = metric_writer.MetricWriter(
        pathlib.Path(workdir) / "evaluation",
        enabled=processes.is_writer(),
        wandb_project=config.training.wandb,
    )
    with contextlib.closing(writer):
        writer.scalars(weights["step"], scalars(results))
