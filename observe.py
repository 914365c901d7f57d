"""What a run shows of itself: metrics, sample grids and evaluations."""

import logging
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

import evaluate
import grids
import sample
from configs import saved
from metrics import evaluators
from parts import load_autoencoder
from run import layout, metric_writer, results, spent
from run import weights as weights_of
from utils import averages, chips, conditions, files, identity, processes, train_metrics

LAG = 2  # steps by which metrics are read late, so that the device never waits for the host


class Views(NamedTuple):
    """What shows a run beside its metrics; None where that is switched off."""

    grids: grids.Grids | None
    evaluation: evaluate.Evaluation | None
    autoencoder: dict  # its identity; {} where none is loaded
    score: str  # the name of its main score in the log


def open_views(config, workdir, parts, records, when):
    """Makes the `Views` of a run.

    Whatever sampling and evaluation need (weights of the autoencoder, reference statistics) is
    asked for here, before the first step, not after hours.

    Args:
      config: the whole config.
      workdir: folder of the run.
      parts: `parts.Parts`.
      records: the training records.
      when: `run.cadence.Cadences`.
    """
    data, fid, sampling, drawn, evaluation = config.dataset, config.fid, config.sampling, None, None
    autoencoder = source = None
    if when.grid.on or when.evaluation.on:
        source = conditions.source(parts.codec.given, data, sampling)
    if when.grid.on or when.evaluation.on:
        autoencoder = load_autoencoder(data, sampling.vae_dtype)
        identity.check_autoencoder(records.identity, autoencoder.identity, data.root)
    if when.grid.on:
        renderer = sample.Renderer(parts, autoencoder, sampling.seed, fid.device_batch_size)
        steps = config.training.sample_steps
        shown = source.records if source and source.records else records
        drawn = grids.Grids(sampling, steps, workdir, parts, renderer, shown, source)
    if when.evaluation.on:
        described = evaluate.describe(config.training, saved.flat(config))
        evaluation = evaluate.Evaluation(
            fid, sampling, parts, autoencoder, records, described, source
        )
    about = {"weights": fid.weights[0], "num_steps": len(sample.times_of(sampling)[0]) - 1}
    score = f"{evaluators.tag('fid', fid.num_samples)}/{results.metric_name(about)}"
    return Views(drawn, evaluation, dict(autoencoder.identity) if autoencoder else {}, score)


class Observer:
    """Shows the state after each step, and changes neither it nor the course of the run.

    Args:
      training: the options `training`.
      workdir: folder of the run.
      parts: `parts.Parts`.
      schedule: function step -> learning rate.
      when: `run.cadence.Cadences`.
      views: `Views`.
    """

    def __init__(self, training, workdir, parts, schedule, when, views):
        self.training, self.workdir, self.parts = training, workdir, parts
        self.schedule, self.when = schedule, when
        self.grids, self.evaluation, self.score = views.grids, views.evaluation, views.score
        self.average = averages.of_options(training)[0]
        self.writer = None
        self._pending = []  # (step, sums on the device)
        self._begun = self._waiting = time.perf_counter()
        self._told = set()
        self._clock = None  # (step, when it was done): where the present log period begins
        self._profiling = False
        self._last_result = None

    def go_by(self, when, schedule):
        """Takes other lengths and another learning rate: those of a changed batch size."""
        self.when, self.schedule = when, schedule
        logging.info("the run ends at step %d, in epoch %.4g", when.total, when.epoch(when.total))

    def compiling(self, step):
        """Says that the first step is compiled, in which nothing is heard of the run."""
        if step < self.when.total:
            logging.info("compiling the train step ...")
            spent.turn("compiling")
        self._waiting = time.perf_counter()

    def begin(self, step, options):
        """Opens the logs of a run that has done `step` steps, with its `options` by name."""
        self.writer = metric_writer.MetricWriter(
            self.workdir,
            resume_step=step,
            finished=step >= self.when.total,
            enabled=processes.is_writer(),
            wandb_project=self.training.wandb,
        )
        self.writer.text("config", "\n".join(f"{name}: {options[name]}" for name in options))
        self.writer.hparams(options, ["raw_loss/all", self.score])
        if self.grids and self.grids.draw_real(step, self.writer):
            self._tell_first("picture, real images", self.grids.folder / layout.REAL)

    def log(self, step, state):
        """Keeps the metrics of a step where it is time to, and writes those of earlier steps."""
        profiled = self.training.profile_steps
        if profiled and processes.is_writer():  # one trace, and one folder for it
            self._profile(step, state, *profiled)
        if self._clock is None:  # the first step compiles, and does not count
            jax.block_until_ready(state)
            self._clock = (step, time.perf_counter())
            spent.turn(spent.STEPS)
            waited = self._clock[1] - self._waiting
            logging.info("compiled: the first step was done after %.1f s", waited)
        if self.when.metrics.due(step):
            self._pending.append((step, jax.tree.map(jnp.copy, state.sums)))
        while self._pending and step >= min(self._pending[0][0] + LAG, self.when.total):
            self._write_metrics(*self._pending.pop(0))

    def flush(self):
        """Writes the metrics of all steps so far."""
        while self._pending:
            self._write_metrics(*self._pending.pop(0))

    def look(self, step, state):
        """Samples and evaluates where it is time to; returns the first result, or None."""
        return self._look(step, state, self.when.grid.due(step), self.when.evaluation.due(step))

    def catch_up(self, step, state):
        """Does what `look` does, where an interrupted run had saved a step but not looked at it."""
        grid = self.when.grid.due(step) and not self.grids.path(step).exists()
        evaluation = self.when.evaluation.due(step) and not self._is_evaluated(step)
        return self._look(step, state, *processes.from_writer([grid, evaluation]))

    def _look(self, step, state, grid, evaluation):
        if not (grid or evaluation):
            return None
        self.flush()  # the log never steps back: W&B would leave out what does
        jax.block_until_ready(state)
        looked = time.perf_counter()
        with spent.of("looking"):
            if grid:
                self._draw_grid(step, state.ema_params[self.average])
            if evaluation:
                self._evaluate(step, state)
        if self._clock:  # looking does not count as training time
            self._clock = (self._clock[0], self._clock[1] + time.perf_counter() - looked)
        return self._last_result if evaluation else None

    def _is_evaluated(self, step):
        lines, _ = layout.metric_lines(self.workdir)
        names = [name for line in lines if line["step"] == step for name in line]
        return any(map(results.is_score, names))

    def _write_metrics(self, step, sums):
        sums = jax.device_get(sums)  # waits for the step, so that the clock is the device's
        now, (last_step, last_time) = time.perf_counter(), self._clock
        self._clock = (step, now)
        steps_per_second = (step - last_step) / max(now - last_time, 1e-9)
        train_metrics.check_finite(sums)
        metrics = train_metrics.means(sums, self.parts.method.rows) | {
            "learning_rate": float(self.schedule(step - 1)),
            "epoch": self.when.epoch(step),
        }
        if step > last_step:
            batch_size = self.training.batch_size
            metrics["images_per_second"] = steps_per_second * batch_size
            method = self.parts.method.phase(step - 1, self.when.total)
            if peak := peak_rate(self.parts._replace(method=method), batch_size):
                metrics["mfu"] = metrics["images_per_second"] / peak
        metrics |= device_memory() | spent.metrics(spent.seconds())
        self.writer.scalars(step, metrics)
        self.writer.progress(step, self.when.total, steps_per_second, metrics)

    def _profile(self, step, state, first, last):
        """Profiles the steps first..last into WORKDIR/profile, for TensorBoard or Perfetto."""
        if step == first - 1 and step < self.when.total:
            jax.block_until_ready(state)
            folder = files.append(self.workdir / layout.PROFILE)
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
            self._profiling = True
        elif self._profiling and step in (last, self.when.total):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._profiling = False
            logging.info(
                "profile of steps %d to %d: %s", first, last, self.workdir / layout.PROFILE
            )

    def _draw_grid(self, step, params):
        self.grids.draw(step, params, self.writer)
        self._tell_first("samples", self.grids.path(step))

    def _tell_first(self, what, path):
        """Says when the first of something is there to be looked at."""
        if what not in self._told:
            seconds = time.perf_counter() - self._begun
            logging.info("first %s, %.1f s after the start: %s", what, seconds, path)
        self._told.add(what)

    def _evaluate(self, step, state):
        weights = weights_of.Weights(
            step, state.params, state.ema_params, self.average, workdir=self.workdir
        )
        entries = self.evaluation.run(weights, self.workdir)
        self.writer.scalars(step, results.scalars(entries) | spent.metrics(spent.seconds()))
        self._last_result = entries[0]

    def end(self, step):
        """Says what came out and where everything lies."""
        self.writer.close()
        if not processes.is_writer():
            return
        logging.info("finished: step %d of %d", step, self.when.total)
        for name in layout.SHOWN:
            if (self.workdir / name).exists():
                logging.info("  %-16s %s", name, self.workdir / name)
        if self._last_result:
            logging.info("%s", results.report(self._last_result))
        logging.info("%s", spent.told(spent.seconds()))


def peak_rate(parts, batch_size):
    """Returns images/s if the devices did the products of a step alone, at their peak.

    None where the peak of the devices or the cost of the network is not known.
    """
    devices, needed = parts.mesh.devices.flat, parts.step_flops(batch_size)
    chip = chips.chip(devices[0], devices)
    if chip is None or needed is None:
        return None
    return chip.peak * parts.mesh.size / needed


def device_memory():
    """Returns the memory of this process's fullest device in GB, where told (by no CPU)."""
    stats = [stat for device in jax.local_devices() if (stat := device.memory_stats())]
    names = {"memory_gb/in_use": "bytes_in_use", "memory_gb/peak": "peak_bytes_in_use"}
    return {
        name: max(stat[key] for stat in stats) / 1e9
        for name, key in names.items()
        if stats and all(key in stat for stat in stats)
    }
