"""What a run shows of itself: metrics, sample grids and evaluations, in their cadences."""

import logging
import time

import jax
import jax.numpy as jnp

import evaluate
import grids
import parts
import sample
from configs import load_config, saved
from metrics import evaluators
from run import best, layout, metric_writer, report, results, snapshots
from utils import chips, identity, processes, train_metrics

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
        if total >= 2**31:
            raise ValueError(f"training.num_epochs: {total} steps are more than 32 bits can count")
        self.rows = model.method.rows
        self.grids = self.evaluation = self.writer = None
        self.snapshots = None  # `run.snapshots.Writer`, where power-function averages are tracked
        self.times = sample.times_of(config.sampling)
        self.autoencoder = {}  # its identity, where one is loaded
        if config.training.sample_on_training or config.fid.on_training:
            autoencoder = parts.load_autoencoder(config.dataset, config.sampling.vae_dtype)
            self.autoencoder = dict(autoencoder.identity)
            identity.check_autoencoder(records.identity, self.autoencoder, config.dataset.root)
        if config.training.sample_on_training:
            size, steps = config.fid.device_batch_size, config.training.sample_steps
            renderer = sample.Renderer(model, autoencoder, config.sampling.seed, size)
            self.grids = grids.Grids(config.sampling, steps, workdir, model, renderer, records)
        if config.fid.on_training:
            described = evaluate.describe(config.training, saved.flat(config))
            self.evaluation = evaluate.Evaluation(
                config.fid, config.sampling, model, autoencoder, records, described
            )
        self.model, self.records = model, records
        self._pending = []  # (step, sums on the device)
        self._begun = self._waiting = time.perf_counter()
        self._told = set()
        self._clock = None  # (step, when it was done): where the present log period begins
        self._profiling = False
        self._last_result = None

    def introduce(self):
        """Says what the run will be, before anything is compiled."""
        lengths = self.steps_per_epoch, self.total
        rows = report.training(
            self.config.model.cls, self.model, self.records, self.config.training,
            bool(self.evaluation), lengths,
        )  # fmt: skip
        pictures = [("pictures", self.grids.describe())] if self.grids else []
        report.tell(rows + pictures)

    def compiling(self, step):
        """Says that the first step is compiled, in which nothing is heard of the run."""
        if step < self.total:
            logging.info("compiling the train step ...")
        self._waiting = time.perf_counter()

    def begin(self, step):
        """Opens the logs of a run that has done `step` steps, and notes what it is made with."""
        if processes.is_writer():
            report.note(self.workdir, load_config.text(self.config))
        self.writer = metric_writer.MetricWriter(
            self.workdir,
            resume_step=step,
            enabled=processes.is_writer(),
            wandb_project=self.config.training.wandb,
        )
        options = load_config.options(self.config)
        self.writer.text("config", "\n".join(f"{name}: {options[name]}" for name in options))
        about = {"weights": self.config.fid.weights[0], "num_steps": len(self.times[0]) - 1}
        fid = evaluators.tag("fid", self.config.fid.num_samples)
        self.writer.hparams(options, ["raw_loss/all", f"{fid}/{results.metric_name(about)}"])
        if self.grids and self.grids.draw_real(step, self.writer):
            self._tell_first("picture, real images", self.grids.folder / layout.REAL)

    def due(self, step, steps, epochs):
        """Whether something is due that is done every `steps` steps, or where that is 0 every
        `epochs` epochs; it always is at the end."""
        cadence = steps or epochs * self.steps_per_epoch
        return step == self.total or (cadence > 0 and step % cadence == 0)

    def checkpoint_due(self, step):
        """Whether to save: in its own cadence, and before an evaluation, which takes long."""
        training = self.config.training
        steps, epochs = training.checkpoint_per_step, training.checkpoint_per_epoch
        return self.due(step, steps, epochs) or self.evaluation_due(step)

    def evaluation_due(self, step):
        """Whether to evaluate."""
        training = self.config.training
        due = self.due(step, training.fid_per_step, training.fid_per_epoch)
        return bool(self.evaluation) and due

    def _grid_due(self, step):
        training = self.config.training
        due = self.due(step, training.sample_per_step, training.sample_per_epoch)
        return bool(self.grids) and due

    def open_snapshots(self, stack, step, state):
        """Begins to keep snapshots, where there is something to keep, until `stack` is closed.

        Args:
          stack: `contextlib.ExitStack`.
          step, state: where the run begins or goes on.
        """
        if sigmas := self.config.training.ema_sigma:
            writer = snapshots.Writer(self.workdir, sigmas, step)
            self.snapshots = stack.enter_context(writer)
            self.take_snapshot(step, state)

    def take_snapshot(self, step, state):
        """Saves the power-function averages where it is time to; never twice.

        Raises:
          OSError: this or the last snapshot could not be written, in one line.
        """
        training = self.config.training
        if self.snapshots and step and self.due(step, 0, training.ema_snapshot_per_epoch):
            self.snapshots.save(step, state.ema_params[-len(training.ema_sigma) :])
        if self.snapshots:
            self.snapshots.check()

    def log(self, step, state):
        """Keeps the metrics of a step where it is time to, and writes those of earlier steps."""
        training = self.config.training
        if training.profile_steps and processes.is_writer():  # one trace, and one folder for it
            self._profile(step, state, *training.profile_steps)
        if self._clock is None:  # the first step compiles, and does not count
            jax.block_until_ready(state)
            self._clock = (step, time.perf_counter())
            waited = self._clock[1] - self._waiting
            logging.info("compiled: the first step was done after %.1f s", waited)
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
        self._look(step, state, self._grid_due(step), self.evaluation_due(step))

    def catch_up(self, step, state):
        """Looks at a step that an interrupted run had saved, and not yet looked at."""
        grid = self._grid_due(step) and not self.grids.path(step).exists()
        evaluation = self.evaluation_due(step) and not self._is_evaluated(step)
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
        lines, _ = layout.metric_lines(self.workdir)
        names = [name for line in lines if line["step"] == step for name in line]
        return any(map(results.is_score, names))

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
            now = self.model._replace(method=self.model.method.phase(step - 1, self.total))
            if peak := peak_rate(now, self.config.training.batch_size):
                metrics["mfu"] = metrics["images_per_second"] / peak
        metrics |= device_memory()
        self.writer.scalars(step, metrics)
        self.writer.progress(step, self.total, steps_per_second, metrics)

    def _profile(self, step, state, first, last):
        """Profiles the steps first..last into WORKDIR/profile, for TensorBoard or Perfetto."""
        if step == first - 1 and step < self.total:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.workdir / layout.PROFILE), create_perfetto_trace=True)
            self._profiling = True
        elif self._profiling and step in (last, self.total):
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
        weights = {"step": step, "params": state.params, "ema_params": state.ema_params}
        weights["ema_vals"] = self.config.training.ema_val
        weights |= {"ema_sigmas": self.config.training.ema_sigma, "workdir": self.workdir}
        found = self.evaluation.run(weights, self.workdir)
        self.writer.scalars(step, results.scalars(found))
        self._last_result = found[0]

    def keep_best(self, step):
        """Keeps the checkpoint of a step, which is on disk, where its evaluation is the best."""
        metric, result = self.config.training.keep_best, self._last_result
        if metric and result and result["checkpoint_step"] == step and processes.is_writer():
            higher = metric in evaluators.HIGHER_IS_BETTER
            how = f"{results.metric_name(result)}, {results.measure(result, metric)}"
            best.keep_best(self.workdir, step, metric, result[metric], higher, how)

    def end(self, step):
        """Says what came out and where everything lies."""
        self.writer.close()
        if not processes.is_writer():
            return
        logging.info("finished: step %d of %d", step, self.total)
        for name in layout.SHOWN:
            if (self.workdir / name).exists():
                logging.info("  %-16s %s", name, self.workdir / name)
        if self._last_result:
            logging.info("%s", results.report(self._last_result))


def peak_rate(model, batch_size):
    """Images/s if the devices did nothing but the products that a step needs, at their peak.

    None where the peak of the devices or the cost of the network is not known.
    """
    devices, needed = model.mesh.devices.flat, model.step_flops(batch_size)
    chip = chips.chip(devices[0], devices)
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
