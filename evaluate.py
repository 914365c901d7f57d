"""Generated images -> features -> FID and its relatives; also the evaluation job.

noise -> latents is one compiled function over all devices, and latents -> images -> uint8 ->
features -> moments another, which is the same for any number of steps: `Evaluator.step`, which is
what runs, is measured and is compiled ahead.
"""

import contextlib
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

import sample
from configs import saved
from metrics import evaluators, features, pairs, reference, scorer
from models.frozen import FROZEN
from parts import load_autoencoder, network_dtype
from parts import make as make_parts
from run import checkpoint, inherit, layout, metric_writer, report, results
from run import weights as weights_of
from utils import (
    compiling,
    conditions,
    contents,
    dataset,
    environment,
    files,
    identity,
    processes,
    sharding,
)

COUNTED = 2**30  # bytes of records that are read to see whether their classes are balanced


class Evaluator:
    """Measures weights: generates images and scores them. Compiles when first called.

    Args:
      parts: `parts.Parts`.
      autoencoder: from `models.vae.load`.
      score: `metrics.scorer.Scorer`.
      options: the options `sampling`.
      counts: from `label_counts`, for `fid.labels: data`.
      source: `utils.conditions.Source`, whose labels are taken too, or None.
    """

    def __init__(self, parts, autoencoder, score, options, counts=None, source=None):
        self.parts, self.autoencoder, self.score, self.options = parts, autoencoder, score, options
        self.counts, mesh = counts, parts.mesh
        self.source, metrics = source, score.options.metrics
        self.keeps_samples = len(evaluators.of_features(metrics)) < len(metrics)
        self.given = sample.given_by(parts.codec, source)
        self.draw = jax.jit(
            self.draw_batch, out_shardings=sharding.by_row(mesh),
            compiler_options=compiling.quick(mesh),
        )  # fmt: skip
        self.add = jax.jit(
            self.add_batch, out_shardings=sharding.replicated(mesh), donate_argnums=0,
            compiler_options=scorer.compiler_options(mesh),
        )  # fmt: skip

    @functools.cached_property
    def vae_params(self):
        """Places the parameters of the autoencoder on every device."""
        return sharding.place_everywhere(self.parts.mesh, self.autoencoder.params)

    def index(self, start):
        """Returns the numbers of a batch of images that begins with `start`, int32 (B,)."""
        index = start + jnp.arange(self.score.batch_size)
        return jax.lax.with_sharding_constraint(index, sharding.by_row(self.parts.mesh))

    def draw_batch(self, params, start, setting, more=None):
        """Draws x of a batch from noise. Pure; compiled for each number of steps.

        `more`: conditions that come with the data, by name.
        """
        index, seed = self.index(start), self.options.seed
        labels, classes = self.score.options.labels, self.parts.num_classes
        given = dict(more or {})
        if "y" not in given:
            given |= sample.conditions(index, labels, classes, seed, self.counts)
        return sample.generate(self.parts, seed, params, index, given, setting)

    def add_batch(self, statistics, vae_params, feature_params, x, start):
        """Decodes a batch and adds it to the statistics. Pure; compiled once. See `Scorer.add`."""
        options = self.score.options
        images = self.autoencoder.finished(vae_params, x, options.rounding)
        count, index = options.num_samples, self.index(start)
        statistics, pool = self.score.add(statistics, feature_params, images, index, count)
        return statistics, (pool, images if self.keeps_samples else None)

    def asked(self, count):
        """Returns what `count` samples are drawn by and their truth, see `metrics.own.numbers`."""
        labels, classes = self.score.options.labels, self.parts.num_classes
        seed, index = self.options.seed, np.arange(count, dtype=np.int32)
        batch = self.source(index) if self.source else {}
        if "label" not in batch:
            y = sample.conditions(index, labels, classes, seed, self.counts)["y"]
            batch["label"] = np.asarray(y)
        if not (self.source and self.source.records):
            return batch, None
        truth = batch.pop(self.source.records.key)
        return batch, truth if truth.dtype == np.uint8 or self.autoencoder.values else (
            self.decoded(np.split(truth, 2, axis=-1)[0])
        )  # fmt: skip

    def decoded(self, latents):
        """Decodes latents of records (N, h, w, c), batch by batch."""
        x = self.parts.codec.normalisation.apply(latents.astype(np.float32))
        size, decode = self.score.batch_size, jax.jit(self.autoencoder.finished, static_argnums=2)
        parts = [x[i : i + size] for i in range(0, len(x), size)]
        rounding = self.score.options.rounding
        return np.concatenate([decode(self.vae_params, part, rounding) for part in parts])

    def step(self, statistics, params, vae_params, feature_params, start, setting):
        """Adds a batch of generated images to the statistics: the two functions that run."""
        x = self.draw(params, start, setting, self.conditions(start))
        return self.add(statistics, vae_params, feature_params, x, start)

    def conditions(self, start):
        """Reads the conditions of the batch that begins with number `start`; None without any."""
        if self.given is None:
            return None
        rows = self.given(start + np.arange(self.score.batch_size))
        by_row = sharding.by_row(self.parts.mesh)
        return jax.tree.map(lambda array: sharding.place(array, by_row), rows)

    def __call__(self, params, setting):
        """Gathers statistics of images of `params`, (pool features, samples), see `Scorer`."""

        def step(statistics, start):
            networks = params, self.vae_params, self.score.feature_params
            return self.step(statistics, *networks, np.int32(start), setting)

        return self.score.gather(step, self.score.options.num_samples, "evaluate")


class Evaluation:
    """Everything that turns weights into results: generator, evaluator and reference.

    Args:
      fid, sampling: the options of these names.
      parts: `parts.Parts`.
      autoencoder: from `models.vae.load`.
      records: the training images, or None.
      described: what a result notes of the network's options, by name.
      source: `utils.conditions.Source` of the generated images, or None.
    """

    def __init__(self, fid, sampling, parts, autoencoder, records, described, source=None):
        latents = bool(autoencoder.identity)
        self.sampling, self.fid = sampling, evaluators.fill(fid, latents)
        x = jax.ShapeDtypeStruct((1, *parts.image_shape), jnp.float32)
        images = jax.eval_shape(autoencoder.decode, autoencoder.params, x)
        normalisation = parts.codec.normalisation if autoencoder.values else None
        networks = features.load(self.fid, normalisation)
        score = scorer.Scorer(networks, parts.mesh, self.fid, images.shape[1:])
        has_truth = source is not None and source.records is not None
        how = autoencoder.values, has_truth, FROZEN["lpips"]
        pairs.check(self.fid.metrics, score.image_shape, *how)
        self.reference = reference.Reference(self.fid, score, records)
        theirs = source is not None and source.labelled  # labels are those of the conditions
        counts = None if theirs else label_counts(self.fid.labels, records, parts.num_classes)
        self.evaluator = Evaluator(parts, autoencoder, score, self.sampling, counts, source)
        self.described = {
            "evaluator": evaluators.describe(self.fid, latents),
            **score.describe(),
            **self.reference.describe(),
            "num_samples": self.fid.num_samples,
            "labels": "of the conditions" if theirs else self.fid.labels,
            **({} if counts is None else {"label_counts": identity.of_arrays({"counts": counts})}),
            "rounding": self.fid.rounding,
            "seed": self.sampling.seed,
            **described,
            **({} if source is None else {"conditions": source.identity}),
            "vae_dtype": autoencoder.dtype,
            "decoder": autoencoder.identity.get("decoder"),
            "environment": environment.describe(),
        }

    def run(self, weights, workdir):
        """Measures every set of weights in every `sample.Setting`.

        What results.json holds of the very same settings is not measured again, so that an
        interrupted job goes on with what is missing.

        Args:
          weights: `run.weights.Weights` on the devices.
          workdir: results.json is written there, added to what it holds, result by result.

        Returns:
          The results, a list of dicts.
        """
        entries = []
        for name in self.fid.weights:
            params = weights_of.choose(weights, name)
            about = {
                "weights": name,
                "weights_checksum": f"{checkpoint.checksums({'params': params}, {})['params']:08x}",
                "checkpoint_step": weights.step,
            }
            for setting in sample.settings(self.sampling):
                entries.append(self.measure(params, about, setting, workdir))
                logging.info("%s", results.report(entries[-1]))
        if len(entries) > 1:
            logging.info("%s", results.table(entries))
            if processes.is_writer() and results.plot(entries, path := workdir / layout.PLOT):
                logging.info("plot: %s", path)
            logging.info("best: %s", results.report(results.by_first_metric(entries)[0]))
        return entries

    def measure(self, params, about, setting, workdir):
        """Returns an entry of results.json: the metrics and all that they depend on."""
        described = {
            **self.described,
            **about,
            "sampling_method": setting.sampler,
            "num_steps": len(setting.times) - 1,
            "sampling_times": [round(float(t), 6) for t in setting.times],
        }
        if guidance := setting.guidance:
            described |= {name: round(float(x), 6) for name, x in guidance._asdict().items()}
        known = results.find(workdir, described, self.fid.metrics)
        if known is None:
            self.reference.statistics()  # before hours of images
            count = self.fid.num_samples
            statistics, (pool, samples) = self.evaluator(params, setting)
            known = self.reference.compare(statistics, pool, count)
            if samples is not None:
                conditions, truth = self.evaluator.asked(count)
                known |= pairs.measure(
                    self.fid.metrics, samples, conditions, truth, FROZEN["lpips"]
                )
            known |= described
            results.save(workdir, known)  # one that is stopped keeps what it has measured
        return known


def label_counts(labels, records, num_classes):
    """Counts the records of each class where `fid.labels` is `data`, int32 (num_classes,), or None.

    Of other labels says where they are drawn as the records do not have them. A large set is not
    read for that.
    """
    by_data = labels == "data"
    if records is None or not num_classes or not (by_data or contents.size_of(records) <= COUNTED):
        return None
    part = jax.process_index(), jax.process_count()
    counts = processes.total(contents.label_counts(records, num_classes, *part))
    if by_data:
        return counts
    if max(counts) > 1.1 * min(counts):
        logging.warning(
            "%s: a class has from %s to %s records, and the evaluation draws each label as often "
            "(fid.labels: %s); fid.labels=data draws them as the records have them",
            records.root, f"{min(counts):,}", f"{max(counts):,}", labels,
        )  # fmt: skip
    return None


def describe(training, options):
    """Tells what a result notes of its network.

    Args:
      training: the options `training`.
      options: all of them, from `saved.flat`.
    """
    return {"network_dtype": network_dtype(training), "options": inherit.digest(options)}


def evaluate_job(config, workdir):
    """Evaluates `load_from`, or the run in `workdir`; with `fid.cache_ref` it needs no data."""
    parts = make_parts(config)
    where = config.load_from or workdir
    weights = weights_of.load(
        where, parts.param_shapes(), config.dataset, may_lack=parts.module.only_for_training
    )
    options = saved.flat(config)
    inherit.check(options, weights, where)
    for name in config.fid.weights:
        weights_of.check_name(weights, name)  # told before hours of images
    weights = weights_of.place(weights, parts.mesh)
    autoencoder = load_autoencoder(config.dataset, config.sampling.vae_dtype)
    inherit.check_autoencoder(weights.identity, autoencoder, where)
    needless = config.fid.cache_ref and config.fid.labels != "data"
    data = config.dataset
    records = None if needless else dataset.open_records(data.root, stage=data.stage)
    described = describe(config.training, options)
    source = conditions.source(parts.codec.given, data, config.sampling)
    evaluation = Evaluation(
        config.fid, config.sampling, parts, autoencoder, records, described, source
    )
    settings, folder = len(sample.settings(config.sampling)), files.path(workdir)
    origin, root = report.origin(weights.step, where), config.dataset.root
    report.tell(report.network(config.model.cls, parts))
    report.tell(report.evaluating(origin, config.fid, root, settings, folder))
    entries = evaluation.run(weights, folder)
    # Beside the log of a run in the same folder, which is not to be added to.
    writer = metric_writer.MetricWriter(
        folder / layout.EVALUATION,
        enabled=processes.is_writer(),
        wandb_project=config.training.wandb,
    )
    with contextlib.closing(writer):
        writer.scalars(weights.step, results.scalars(entries))


if __name__ == "__main__":
    raise SystemExit(report.not_a_command(__file__, " --config.eval_only=True"))
