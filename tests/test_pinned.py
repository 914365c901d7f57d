"""The numbers of the version of 2026-11-23 (commit c4a4533), before the objectives had a room.

Loss and gradients, a short training of the digits, and a run's folder that is continued, evaluated
and sampled from. Its numbers are in golden/run_2026_11_23/expected.json, made by that version.

Bit for bit is one call of a compiled function (loss and gradients, images and features of stored
weights) where jax, the processor and its instructions are those of the numbers: the same machine
code on the same input. A training is not: on another processor of the same name and instructions
it leaves the numbers by the last digit after some steps (a reciprocal square root begins from the
processor's own approximation, for one). Measured here, weights of which each is the next float32
move metrics by 2e-7 and norms of arrays by 5e-6 within ten steps; the bounds are 20 times that.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import zlib

import jax
import jobs
import make
import numpy as np
import published
import pytest

import evaluate
import sample
import train
from models import network
from scripts import prepare_dataset

GOLDEN = pathlib.Path(__file__).parent / "golden"
RUN = GOLDEN / "run_2026_11_23"
EXPECTED = json.loads((RUN / "expected.json").read_text())


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    words = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    return f"{zlib.crc32(''.join(words).encode()):08x}"


# Of the user's own settings; conftest.py adds flags of its own.
OTHER_CODE = "xla_cpu_max_isa" in os.environ["XLA_FLAGS"] or "OPENBLAS_CORETYPE" in os.environ
EXACT = (jax.__version__, processor(), OTHER_CODE) == (EXPECTED["jax"], EXPECTED["cpu"], False)
TRAINED, NORMS = 5e-6, 1e-4  # bounds of the metrics and of the arrays' norms after a training


def sha256(*arrays):
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def assert_numbers(found, expected, rtol):
    """Numbers that are equal, or as near as `rtol` on another machine."""
    np.testing.assert_allclose(found, expected, rtol=0 if EXACT else rtol)


def assert_trained(found, expected):
    """{name: array} against {name: (its digest, its norm)}."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        _, norm = expected[name]
        np.testing.assert_allclose(np.linalg.norm(array), norm, rtol=NORMS, err_msg=name)


def arrays_of(workdir, step):
    """The arrays of a checkpoint, the average under the place that it had in that version."""
    found = jobs.checkpoints(workdir)
    arrays = {k[1]: v for k, v in found.items() if k[0] == step and not isinstance(v, dict)}
    return {k.replace("['ema_0.98']", "[0]"): array for k, array in arrays.items()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "digits"
    assert prepare_dataset.main(["digits", f"--output={folder}"]) == 0
    return folder


@pytest.mark.parametrize("case", EXPECTED["objective"])
def test_loss_and_gradients(case):
    data = published.load(GOLDEN)
    x, y, draws, num_equal, _ = data.batch("objective/batch/")
    method = data.method(data.info["cases"][case], num_equal, len(x))

    def loss(params):
        return method.loss(network.function(data.net), params, x, {"y": y}, draws, {})

    (value, rows), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(data.params)
    expected = EXPECTED["objective"][case]
    assert_numbers(value, np.float32(expected["loss"]), 1e-6)
    for key in ("error", "v_loss"):
        assert_numbers(rows[key], np.float32(expected[key]), 1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    named = sorted((jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves)
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for _, leaf in named))
    np.testing.assert_allclose(norm, expected["gradient_norm"], rtol=1e-5)
    if EXACT:
        parts = [
            part for path, leaf in named for part in (np.frombuffer(path.encode(), "u1"), leaf)
        ]
        assert sha256(*parts) == expected["gradient_sha256"]


@pytest.mark.slow
def test_twenty_steps_of_the_digits(digits, tmp_path):
    words = [f"dataset.root={digits}", "training.num_steps=20", "training.log_per_step=5"]
    config = make.config(*words, "training.sample_on_training=false", name="digits")
    train.train_job(config, tmp_path)
    lines, expected = jobs.metrics(tmp_path), EXPECTED["digits"]["metrics"]
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, before in zip(lines, expected, strict=True):
        np.testing.assert_allclose(list(line.values()), list(before.values()), rtol=TRAINED)
    assert_trained(arrays_of(tmp_path, 20), EXPECTED["digits"]["arrays"])


@pytest.fixture
def config(digits):
    """The config of the kept run, with other words."""

    def config(*words, on_training="true"):
        words = [*EXPECTED["small"], f"dataset.root={digits}", *words]
        return make.config(*words, f"fid.on_training={on_training}", name="digits")

    return config


def test_its_run_goes_on(config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(RUN, workdir)
    train.train_job(config("training.num_steps=30"), workdir)
    lines = [
        {re.sub("@[^/]*", "", name): value for name, value in line.items()}  # of few samples
        for line in jobs.metrics(workdir)
        if line["step"] > 20
    ]
    expected = EXPECTED["metrics_to_step_30"]
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, before in zip(lines, expected, strict=True):
        # The distance of fewer samples than pixels feels the last bits of the linear algebra.
        distance = {name for name in line if name.startswith("fid/")}
        same = [name for name in line if name not in distance]
        np.testing.assert_allclose([line[n] for n in same], [before[n] for n in same], rtol=TRAINED)
        for name in distance:
            assert line[name] == pytest.approx(before[name], rel=1e-3)
    assert_trained(arrays_of(workdir, 30), EXPECTED["arrays_of_step_30"])
    assert jobs.checkpoints(workdir)[30, "data"]["position"] == 30 * 16


def test_its_run_is_evaluated(config, tmp_path):
    words = ["sampling.num_steps=1,2", "fid.weights=ema,params", "eval_only=true"]
    evaluate.evaluate_job(config(*words, f"load_from={RUN}"), tmp_path)
    found = jobs.results(tmp_path)
    assert len(found) == len(EXPECTED["evaluated"])
    for result, before in zip(found, EXPECTED["evaluated"], strict=True):
        for name in ("weights", "num_steps", "weights_checksum"):
            assert result[name] == before[name]
        assert result["fid"] == pytest.approx(before["fid"], rel=1e-9 if EXACT else 1e-2)


def test_its_run_is_sampled_from(config, tmp_path):
    words = ["sampling.format=npz", "sampling.num_images=20", "sample_only=true"]
    sample.sample_job(config(*words, f"load_from={RUN}"), tmp_path)
    images = np.load(tmp_path / "samples" / "step_20" / "samples.npz")["arr_0"]
    assert images.mean() == pytest.approx(EXPECTED["sampled_mean"], rel=0 if EXACT else 1e-2)
    if EXACT:
        assert sha256(images) == EXPECTED["sampled_sha256"]
