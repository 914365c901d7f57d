"""Runs main.py on a tiny model, in one process or in several that share the CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import main
from run import checkpoint, layout
from utils import dataset

ROOT = Path(__file__).resolve().parent.parent
SHAPE, CLASSES = (4, 4, 1), 3
RECORDS = 40  # with batches of 16, an epoch is 2 steps and ends within a batch
OPTIONS = {
    "dataset.image_size": SHAPE[0],
    "dataset.num_classes": CLASSES,
    "dataset.num_workers": 1,
    "model.depth": 1,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "method.guidance_eq": "none",  # fewer passes to trace
    "training.batch_size": 16,
    "training.num_steps": 24,
    "training.learning_rate": 0.002,
    "training.lr_schedule": "const",
    "training.warmup_steps": 0,
    "training.log_per_step": 3,
    "training.checkpoint_per_epoch": 4,
    "training.sample_per_epoch": 4,
    "training.sample_steps": "",  # one more function to compile; tests/test_monitoring.py has it
    "training.fid_per_epoch": 4,
    "fid.num_samples": 32,
    "fid.labels": "data",  # each process counts a part of the records
    "fid.device_batch_size": 4,
}
ALONE = "--num_processes=1"  # for a job within the tests: jax, in use already, has nothing to join
STEPS_ALONE = {"fid.on_training": False, "training.sample_on_training": False}
TIMINGS = ("images_per_second", "goodput", "seconds/")


def write_records(root):
    """A dataset of two shards of random images; returns its folder."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (RECORDS, *SHAPE)).astype(np.uint8)
    examples = [{"image": image, "label": i % CLASSES} for i, image in enumerate(images)]
    half = RECORDS // 2
    root.mkdir(parents=True)
    for i in range(2):
        path = dataset.shard_path(root, "train", i, 2)
        dataset.write_shard(path, examples[i * half : (i + 1) * half])
    dataset.write_metadata(root, "image", SHAPE, np.uint8, CLASSES, {"train": [half, half]})
    return root


class Jobs:
    """Starts jobs in a folder of their own, on the same records.

    Args:
      folder: an empty one, for the records and the runs.
      config: the file of configs/ that they go by.
    """

    def __init__(self, folder, config="digits"):
        self.folder, self.config = folder, config
        self.records = write_records(folder / "records")
        self.env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}

    def command(self, workdir, options=None):
        """The command line of a job; `options` beside or instead of OPTIONS, None without it."""
        options = {"dataset.root": self.records, **OPTIONS, **(options or {})}
        words = [f"--config.{name}={value}" for name, value in options.items() if value is not None]
        config = f"--config=configs/load_config.py:{self.config}"
        return [sys.executable, "main.py", f"--workdir={workdir}", config, *words]

    def start(self, workdir, options=None, count=1, flags=(), parts=None, words=None):
        """Starts the processes of a job and returns them; their output goes to WORKDIR.log.N.

        `parts`: which of the `count` processes to start, all by default; `words`: what follows
        the name of Python, instead of the command line of a job.
        """
        words = words or self.command(workdir, options)[1:]
        address = f"localhost:{free_port()}"
        started = []
        for i in range(count) if parts is None else parts:
            several = [f"--coordinator_address={address}", f"--num_processes={count}"]
            several += [f"--process_id={i}"]
            log = Path(f"{workdir}.log.{i}").open("a")
            command = [sys.executable, *words, *flags, *(several if count > 1 else ())]
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log)
            )
            log.close()
        return started

    def run(self, workdir, options=None, count=1, timeout=120):
        """Runs a job to its end: (exit statuses, outputs)."""
        before = [len(text) for text in outputs(workdir, count)]
        statuses = wait(self.start(workdir, options, count), timeout)
        texts = outputs(workdir, count)
        return statuses, [text[start:] for text, start in zip(texts, before, strict=True)]

    def train(self, workdir, options=None, count=1):
        """Runs a job that has to succeed; returns its outputs."""
        statuses, texts = self.run(workdir, options, count)
        assert statuses == [0] * count, "\n".join(texts)
        return texts

    def run_here(self, workdir, options=None):
        """Runs a job that has to succeed in this process, which need not start."""
        assert main.main([*self.command(workdir, options)[2:], ALONE]) == 0

    def killed(self, options):
        """Runs a job twice to its end, the second killed after its first checkpoint; (folder,
        folder)."""
        whole, killed = self.folder / "whole", self.folder / "killed"
        self.train(whole, options)
        (process,) = self.start(killed, options)
        until(lambda: layout.steps(killed), process)
        process.kill()
        assert wait([process]) == [-signal.SIGKILL]
        self.train(killed, options)
        return whole, killed


def until(condition, process, timeout=120):
    """Waits for a condition while a process runs."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the job ended early"
        assert time.monotonic() < end
        time.sleep(0.01)


def wait(started, timeout=120):
    """The exit statuses of processes; kills them when the time is over."""
    until = time.monotonic() + timeout
    try:
        return [process.wait(max(until - time.monotonic(), 0.1)) for process in started]
    finally:
        for process in started:
            process.kill()


def outputs(workdir, count=1):
    """What the processes of a job have printed, of all its starts."""
    paths = [Path(f"{workdir}.log.{i}") for i in range(count)]
    return [path.read_text() if path.exists() else "" for path in paths]


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def metrics(workdir):
    """The lines of metrics.jsonl without timings, in their order."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]


def results(workdir):
    """What results.json holds, in its order."""
    return json.loads((Path(workdir) / "results.json").read_text())


def checkpoints(workdir):
    """All that the checkpoints of a run hold: {(step, name): array or plain value}."""
    import jax

    found = {}
    for step in layout.steps(workdir):
        arrays = checkpoint.read_arrays(workdir, step, dict.fromkeys(checkpoint.ARRAYS))
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
            found[step, jax.tree_util.keystr(path)] = leaf
        found[step, "data"] = checkpoint.read_plain(workdir, step)["data"]
    return found


def assert_equal_runs(one, other, tolerance=0):
    """Two runs have the same checkpoints, metrics and results, to a relative tolerance."""
    a, b = checkpoints(one), checkpoints(other)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert value == b[key], key
        else:
            near = dict(rtol=tolerance, atol=tolerance * (np.abs(value).max() if value.size else 0))
            np.testing.assert_allclose(value, b[key], **near, err_msg=str(key))
            assert value.dtype == b[key].dtype
    for lines, others in ((metrics(one), metrics(other)), (results(one), results(other))):
        assert len(lines) == len(others)
        for line, twin in zip(lines, others, strict=True):
            assert line.keys() == twin.keys()
            for name, value in line.items():
                if isinstance(value, float):
                    assert abs(value - twin[name]) <= tolerance * abs(value), (name, value, twin)
                else:
                    assert value == twin[name], name
