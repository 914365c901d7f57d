"""Power-function averages of a run, their snapshots, and sweeps over all of it."""

import json
import shutil

import jax
import make
import numpy as np
import pytest
from jobs import Jobs, assert_equal_runs, results

import evaluate
import parts
from metrics import evaluators
from run import checkpoint, layout
from run import results as stored
from run import weights as weights_of
from utils import averages

TRACKED = (0.05, 0.10)
PROFILES = ("ema_sigma0.05", "ema_sigma0.1")
OPTIONS = {
    "training.ema_sigma": ",".join(map(str, TRACKED)),
    "training.ema_snapshot_per_epoch": 2,  # of 2 steps each
    "fid.weights": "ema,ema_sigma0.05",
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def run(jobs):
    """A run that tracked two profiles, from its beginning to its end."""
    workdir = jobs.folder / "run"
    jobs.run_here(workdir, OPTIONS)
    return workdir


def arrays_of(workdir, step):
    root = layout.snapshots(workdir)
    found = checkpoint.read_arrays(root, step, {"ema_params": None})
    checkpoint.verify(root, step, found, checkpoint.read_plain(root, step))
    return found["ema_params"]


def test_snapshots_come_in_their_own_cadence_and_half_precision(run):
    steps = layout.steps(layout.snapshots(run))
    assert steps == [4, 8, 12, 16, 20, 24]
    found, snapshot = weights_of.of_run(run).ema_params, arrays_of(run, 24)
    assert found.keys() == {"ema_0.98", *snapshot} and snapshot.keys() == set(PROFILES)
    for name in PROFILES:
        for a, b in zip(*map(jax.tree.leaves, (found[name], snapshot[name])), strict=True):
            assert (a.dtype, b.dtype) == (np.float32, np.float16)
            np.testing.assert_array_equal(a.astype(np.float16), b)
    first, last = (jax.tree.leaves(found[name])[0] for name in PROFILES)
    assert np.abs(first - last).max() > 0  # each profile is its own


def test_an_interrupted_run_leaves_the_same_snapshots(jobs, run):
    """It goes on behind its last checkpoint, and takes what came after that anew."""
    broken = jobs.folder / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "24")
    shutil.rmtree(layout.snapshots(broken) / "checkpoints" / "16")  # not yet complete
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 16]
    (broken / "metrics.jsonl").write_text("".join(kept))
    jobs.run_here(broken, OPTIONS)
    assert_equal_runs(run, broken)
    assert layout.steps(layout.snapshots(broken)) == layout.steps(layout.snapshots(run))
    for step in layout.steps(layout.snapshots(run)):
        for a, b in zip(*(jax.tree.leaves(arrays_of(w, step)) for w in (run, broken)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def config(jobs):
    """A config of the evaluation of the run, with other words."""

    def config(*words):
        command = jobs.command("unused")
        chosen = [word.removeprefix("--config.") for word in command if "--config." in word]
        return make.config(*chosen, "eval_only=true", *words, name="digits")

    return config


def test_any_profile_is_reconstructed(run, config):
    model = parts.make(config())
    found = weights_of.load(run, model.param_shapes(), config().dataset)
    found = weights_of.place(found, model.mesh)
    tracked = weights_of.choose(found, "ema_sigma0.05")
    assert tracked is found.ema_params["ema_sigma0.05"]
    chosen = weights_of.choose(found, "ema_sigma0.075")
    # by hand: all snapshots before the last step, and the averages of the last in full precision
    steps = layout.steps(layout.snapshots(run))
    times, sigmas = np.repeat(steps, 2), np.tile(TRACKED, len(steps))
    factors = averages.coefficients(times, sigmas, steps[-1], 0.075)
    snapshot_of = [arrays_of(run, step) for step in steps[:-1]]
    last = weights_of.of_run(run).ema_params
    trees = [averages_of[name] for averages_of in (*snapshot_of, last) for name in PROFILES]
    for leaf, *parts_of in zip(*map(jax.tree.leaves, (chosen, *trees)), strict=True):
        expected = sum(f * p.astype(np.float64) for f, p in zip(factors, parts_of, strict=True))
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-5)


def test_a_sweep_goes_on_with_what_is_missing(run, config, tmp_path, caplog):
    words = ["fid.weights=ema,ema_sigma0.05,ema_sigma0.15", "sampling.num_steps=1,2"]
    options = config(f"load_from={run}", *words)
    evaluate.evaluate_job(options, tmp_path)
    first = results(tmp_path)
    named = [(result["weights"], result["num_steps"]) for result in first]
    assert named == [(w, n) for w in ("ema", "ema_sigma0.05", "ema_sigma0.15") for n in (1, 2)]
    assert len({result["weights_checksum"] for result in first}) == 3
    # Two results are taken away, and one is marked: it must not be measured again.
    kept = [result | {"fid": 1.5} if i == 1 else result for i, result in enumerate(first)]
    (tmp_path / "results.json").write_text(json.dumps([kept[i] for i in (0, 1, 3, 4)]))
    measured = []
    original = evaluate.Evaluator.__call__
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(
            evaluate.Evaluator, "__call__",
            lambda self, *args: measured.append(1) or original(self, *args),
        )  # fmt: skip
        evaluate.evaluate_job(options, tmp_path)
    assert len(measured) == 2
    again = {(r["weights"], r["num_steps"]): r["fid"] for r in results(tmp_path)}
    assert again == {(r["weights"], r["num_steps"]): r["fid"] for r in kept}
    (table,) = [m for m in caplog.messages if m.split()[:1] == ["weights"] and " fid" in m]
    distances = [float(line.split()[-1]) for line in table.splitlines()[1:]]
    assert distances == sorted(distances) and 1.5 in distances


def test_a_sweep_over_samplers_and_guidance(jobs, config, tmp_path):
    run, flow = jobs.folder / "flow", {"method.name": "flow", "training.learning_rate": 0.01}
    jobs.run_here(run, OPTIONS | flow)
    words = ["method.name=flow", "sampling.method=euler,heun", "sampling.omega=1,300"]
    evaluate.evaluate_job(config(f"load_from={run}", *words, "sampling.num_steps=2"), tmp_path)
    found = results(tmp_path)
    settings = [(result["sampling_method"], result["omega"]) for result in found]
    assert settings == [("euler", 1), ("euler", 300), ("heun", 1), ("heun", 300)]
    assert len({result["fid"] for result in found}) == 4


def result(weights="ema", **more):
    return {"fid": 3.0, "weights": weights, "num_steps": 1, "sampling_method": "ode", **more}


def test_a_plot_of_guidance_and_of_profiles(tmp_path):
    by_guidance = [
        result(omega=omega, t_min=0.0, t_max=1.0, num_steps=steps, fid=omega + steps)
        for steps in (1, 2) for omega in (2.0, 1.0)
    ]  # fmt: skip
    axis, lines = stored._lines(by_guidance)
    assert axis == "omega" and len(lines) == 2
    by_profile = [result(f"ema_sigma{sigma}") for sigma in (0.05, 0.1)]
    assert stored._lines(by_profile)[0] == "sigma_rel"
    assert not stored.plot([result(), result("params")], tmp_path / "none.png")
    pytest.importorskip("matplotlib")
    assert stored.plot(by_guidance, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (["training.ema_sigma=0.3"], "training.ema_sigma 0.3: sigma_rel of an average lies"),
        (["fid.weights=ema_sigma0.5", "eval_only=true"], "fid.weights ema_sigma0.5: sigma_rel"),
        (["fid.weights=ema_sigma0.05"], "fid.weights are of ema | params"),
    ],
)
def test_profiles_that_there_are_not(words, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        parts.check(make.config(*words, name="digits"))


def test_a_run_without_profiles_has_none_to_choose():
    found = weights_of.Weights(1, {}, {"ema_0.9": {}}, "ema_0.9")
    with pytest.raises(ValueError, match="ema_sigma0.07 needs a run that tracked"):
        weights_of.choose(found, "ema_sigma0.07")


@pytest.mark.parametrize("metric", ["precision", "precision_float16", "inception_score", "kid"])
def test_which_result_is_the_best(metric):
    """As the table sorts, so the best checkpoint is kept."""
    higher = metric != "kid"
    assert (metric in evaluators.HIGHER_IS_BETTER) == higher
    found = stored.by_first_metric([{metric: 0.2}, {metric: 0.4}, {metric: 0.3}])
    assert found[0][metric] == (0.4 if higher else 0.2)
