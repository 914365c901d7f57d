"""What a run shows of itself: metrics, sample grids and evaluations, in their cadences."""

import json
import logging
import re
import time

import jax
import jax.numpy as jnp

import evaluate
import parts
import sample
from configs import load_config
from methods import path
from utils import chips, identity, metric_writer, processes, train_metrics
from utils import images as image_utils

LAG = 2  # steps by which metrics are read late, so that the device never waits for the host


class Observer:
    """Looks at the state after each step, and never changes it.

    Whatever sampling and evaluation need (weights of the autoencoder, reference statistics) is
    asked for here, before the first step.

    Args:
      config: the whole config.
      workdir: folder of the run.
      model: `parts.Parts`.
      records: the training records.
      schedule: function step -> learning rate.
      steps_per_epoch, total: lengths in steps.
    """

    def __init__(self, config, workdir, model, records, schedule, steps_per_epoch, total):
        self.config, self.workdir, self.schedule = config, workdir, schedule
        self.steps_per_epoch, self.total = steps_per_epoch, total
        self.rows = model.method.rows
        self.sampler = self.evaluation = self.writer = None
        self.times = path.sample_times(
            config.sampling.num_steps[0], config.sampling.sampling_timesteps
        )
        self.labels = sample.grid_labels(config.dataset.num_classes)
        self.autoencoder = {}  # its identity, where one is loaded
        if config.training.sample_on_training or config.fid.on_training:
            autoencoder = parts.load_autoencoder(config)
            self.autoencoder = dict(autoencoder.identity)
            identity.check_autoencoder(records.identity, self.autoencoder, config.dataset.root)
        if config.training.sample_on_training:
            self.sampler = sample.Sampler(
                model, autoencoder, config.sampling, config.fid.device_batch_size
            )
        if config.fid.on_training:
            self.evaluation = evaluate.Evaluation(config, model, autoencoder, records)
        self.peak_rate = peak_rate(model, config.training.batch_size)
        self._pending = []  # (step, sums on the device)
        self._clock = None  # (step, when it was done): where the present log period begins
        self._profiling = False
        self._last_result = None

    def begin(self, step):
        """Opens the logs of a run that has done `step` steps."""
        self.writer = metric_writer.MetricWriter(
            self.workdir,
            resume_step=step,
            enabled=processes.is_writer(),
            wandb_project=self.config.training.wandb,
        )
        options = load_config.options(self.config)
        self.writer.text("config", "\n".join(f"{name}: {options[name]}" for name in options))
        about = {"weights": self.config.fid.weights[0], "num_steps": len(self.times) - 1}
        self.writer.hparams(options, ["raw_loss/all", f"fid/{evaluate.metric_name(about)}"])

    def due(self, step, epochs):
        """Whether something that is done every `epochs` epochs, and at the end, is due."""
        return step == self.total or (epochs > 0 and step % (epochs * self.steps_per_epoch) == 0)

    def checkpoint_due(self, step):
        """Whether to save: in its own cadence, and before an evaluation, which takes long."""
        training = self.config.training
        return self.due(step, training.checkpoint_per_epoch) or self._evaluation_due(step)

    def _evaluation_due(self, step):
        return bool(self.evaluation) and self.due(step, self.config.training.fid_per_epoch)

    def _grid_due(self, step):
        return bool(self.sampler) and self.due(step, self.config.training.sample_per_epoch)

    def log(self, step, state):
        """Keeps the metrics of a step where it is time to, and writes those of earlier steps."""
        training = self.config.training
        if training.profile_steps and processes.is_writer():  # one trace, and one folder for it
            self._profile(step, state, *training.profile_steps)
        if self._clock is None:  # the first step compiles, and does not count
            jax.block_until_ready(state)
            self._clock = (step, time.perf_counter())
        if step % training.log_per_step == 0 or step == self.total:
            self._pending.append((step, jax.tree.map(jnp.copy, state.sums)))
        while self._pending and step >= min(self._pending[0][0] + LAG, self.total):
            self._write_metrics(*self._pending.pop(0))

    def flush(self):
        """Writes the metrics of all steps so far."""
        while self._pending:
            self._write_metrics(*self._pending.pop(0))

    def look(self, step, state):
        """Samples and evaluates where it is time to."""
        self._look(step, state, self._grid_due(step), self._evaluation_due(step))

    def catch_up(self, step, state):
        """Looks at a step that an interrupted run had saved, and not yet looked at."""
        grid = self._grid_due(step) and not self._grid_path(step).exists()
        evaluation = self._evaluation_due(step) and not self._is_evaluated(step)
        self._look(step, state, *processes.from_writer([grid, evaluation]))

    def _look(self, step, state, grid, evaluation):
        if not (grid or evaluation):
            return
        self.flush()  # the log never steps back: W&B would leave out what does
        jax.block_until_ready(state)
        looked = time.perf_counter()
        if grid:
            self._draw_grid(step, state.ema_params[0])
        if evaluation:
            self._evaluate(step, state)
        if self._clock:  # looking does not count as training time
            self._clock = (self._clock[0], self._clock[1] + time.perf_counter() - looked)

    def _is_evaluated(self, step):
        path = self.workdir / metric_writer.JSONL
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        names = [name for line in lines if line["step"] == step for name in line]
        return any(re.search(r"/.*_\d+step", name) for name in names)  # as _evaluate logs them

    def _grid_path(self, step):
        return self.workdir / "samples" / f"grid_{step:08d}.png"

    def _write_metrics(self, step, sums):
        sums = jax.device_get(sums)  # waits for the step, so that the clock is the device's
        now, (last_step, last_time) = time.perf_counter(), self._clock
        self._clock = (step, now)
        steps_per_second = (step - last_step) / max(now - last_time, 1e-9)
        train_metrics.check_finite(sums)
        metrics = train_metrics.means(sums, self.rows) | {
            "learning_rate": float(self.schedule(step - 1)),
            "epoch": step / self.steps_per_epoch,
        }
        if step > last_step:
            metrics["images_per_second"] = steps_per_second * self.config.training.batch_size
            if self.peak_rate:
                metrics["mfu"] = metrics["images_per_second"] / self.peak_rate
        metrics |= device_memory()
        self.writer.scalars(step, metrics)
        self.writer.progress(step, self.total, steps_per_second, metrics)

    def _profile(self, step, state, first, last):
        """Profiles the steps first..last into WORKDIR/profile, for TensorBoard or Perfetto."""
        if step == first - 1 and step < self.total:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.workdir / "profile"), create_perfetto_trace=True)
            self._profiling = True
        elif self._profiling and step in (last, self.total):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._profiling = False
            logging.info("profile of steps %d to %d: %s", first, last, self.workdir / "profile")

    def _draw_grid(self, step, params):
        guidance = sample.guidances(self.config.sampling)[0]
        picture = sample.grid(self.sampler, params, self.labels, self.times, guidance)
        self.writer.image(step, "samples", picture)
        if processes.is_writer():
            self._grid_path(step).parent.mkdir(exist_ok=True)
            image_utils.save_png(self._grid_path(step), picture)

    def _evaluate(self, step, state):
        weights = {"step": step, "params": state.params, "ema_params": state.ema_params}
        weights["ema_vals"] = self.config.training.ema_val
        results = self.evaluation.run(weights, self.workdir)
        self.writer.scalars(step, evaluate.scalars(results))
        self._last_result = results[0]

    def end(self, step):
        """Says what came out and where everything lies."""
        self.writer.close()
        if not processes.is_writer():
            return
        logging.info("finished: step %d of %d", step, self.total)
        for name in ("samples", "checkpoints", "results.json", "metrics.jsonl"):
            if (self.workdir / name).exists():
                logging.info("  %-16s %s", name, self.workdir / name)
        if self._last_result:
            logging.info("%s", evaluate.report(self._last_result))


def peak_rate(model, batch_size):
    """Images/s if the devices did nothing but the products that a step needs, at their peak.

    None where the peak of the devices or the cost of the network is not known.
    """
    chip, needed = chips.chip(model.mesh.devices.flat[0]), model.step_flops(batch_size)
    if chip is None or needed is None:
        return None
    return chip.peak * model.mesh.size / needed


def device_memory():
    """Memory of the fullest device of this process in GB, where its backend tells (no CPU does)."""
    stats = [stat for device in jax.local_devices() if (stat := device.memory_stats())]
    names = {"memory_gb/in_use": "bytes_in_use", "memory_gb/peak": "peak_bytes_in_use"}
    return {
        name: max(stat[key] for stat in stats) / 1e9
        for name, key in names.items()
        if stats and all(key in stat for stat in stats)
    }
