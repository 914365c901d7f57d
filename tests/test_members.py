"""The split family in a run: its phases, what a step costs, resuming, and that it needs no JVP."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import make
import numpy as np
import pytest
from jobs import OPTIONS, write_records
from test_benchmark import count, get_config

import parts
import sample
import train
from benchmarks import costs
from formats import published
from methods import alphaflow
from models import network
from models.network import Velocity
from run import best as best_of
from run import config as run_config
from run import layout, resume, weights

MEMBERS = {
    "trajectory": {},
    "alphaflow": {},
    "soflow": {},
    "splitmeanflow": {},
    "consistency": {"data_proportion": 0.0},
    "central_difference": {},
    "tim": {},
    "shortcut": {"omega": 1.5, "norm_p": 0.0},
}


@jax.custom_vjp
def _backwards_only(x):
    return jnp.tanh(x)


_backwards_only.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))


def toy_net(params, *batches, jvp=None, key=None):
    """A network that has no forward-mode derivative, as most fused attention kernels have none."""

    def u(z, c):
        x = z.reshape(len(z), -1) @ params["z"] + jnp.stack([c["t"], c["h"]], 1) @ params["times"]
        x = _backwards_only(x + params["y"][c["y"]])
        return Velocity((x @ params["z"].T).reshape(z.shape))

    return tuple(u(*batch) for batch in batches)


def forwards_too(params, z, t, h, y):
    x = z.reshape(len(z), -1) @ params["z"] + jnp.stack([t, h], 1) @ params["times"]
    return (jnp.tanh(x + params["y"][y]) @ params["z"].T).reshape(z.shape)


def toy_problem(method, batch_size=16):
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "z": jax.random.normal(keys[0], (4, 8)),
        "times": jax.random.normal(keys[1], (2, 8)),
        "y": jax.random.normal(keys[2], (method.num_classes + 1, 8)),
    }
    x = jax.random.normal(keys[3], (batch_size, 2, 2, 1))
    y = jax.random.randint(keys[4], (batch_size,), 0, method.num_classes)
    draws = method.draw(keys[5], x.shape, jnp.int32(3))
    return params, x, {"y": y}, draws, {"ema_params": jax.tree.map(lambda a: 0.9 * a, params)}


def gradient(method, net, params, x, given, draws, held, parts_of_batch=1):
    recipe = train.Recipe(net, method, None, None, (), grad_accum_steps=parts_of_batch)
    key = jax.random.key(0)
    return jax.jit(partial(train.gradients, recipe))(params, x, given, draws, held, key)


@pytest.mark.parametrize("name", MEMBERS)
def test_no_pass_needs_a_forward_mode_derivative_and_parts_of_a_batch_are_the_whole(name):
    method = make.method(name, **MEMBERS[name]).phase(8, 16)
    problem = toy_problem(method)
    (loss, rows), whole = gradient(method, toy_net, *problem)
    assert rows.keys() == set(method.rows)
    (in_parts, rows_in_parts), grads = gradient(method, toy_net, *problem, parts_of_batch=2)
    np.testing.assert_allclose(in_parts, loss, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, whole)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), rows_in_parts, rows)


@pytest.mark.parametrize("name", ["meanflow", "flow", *MEMBERS])
def test_an_objective_knows_no_rank(name):
    """Vectors of numbers are images of as many pixels."""
    method = make.method(name, **MEMBERS.get(name, {}))
    net = make.as_net(forwards_too)
    params, x, given, draws, held = toy_problem(method)
    (loss, rows), grads = gradient(method, net, params, x, given, draws, held)
    noise = draws.noise.reshape(len(x), -1)
    flat = x.reshape(len(x), -1), given, draws._replace(noise=noise)
    found = gradient(method, net, params, *flat, held)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, ((loss, rows), grads))


def test_only_the_last_phase_of_alpha_flow_has_a_jvp():
    method = make.method("alphaflow").phase(16, 16)
    assert isinstance(method, alphaflow.End)
    with pytest.raises((TypeError, NotImplementedError), match="forward-mode|rule"):
        gradient(method, toy_net, *toy_problem(method))
    gradient(method, make.as_net(forwards_too), *toy_problem(method))
    floor = make.method("alphaflow", alpha_floor=True).phase(16, 16)
    gradient(floor, toy_net, *toy_problem(floor))


def test_phases_go_by_the_step():
    method = make.method("alphaflow", alpha_begin=100)
    kinds = [type(method.phase(step, 1100)) for step in (0, 388, 389, 700, 811, 812, 2000)]
    first, middle, last = alphaflow.Trajectory, alphaflow.AlphaFlow, alphaflow.End
    assert kinds == [first, first, middle, middle, middle, last, last]
    method = method.phase(389, 1100)
    alpha = [float(method.alpha(None, jnp.int32(k), jnp.ones(1), None)[0]) for k in (389, 600, 811)]
    np.testing.assert_allclose(alpha, [0.9942, 0.5, 0.0053], rtol=0.1)
    assert method.phase(5000, 1100).alpha_end == 1100  # once set, an end stays
    assert hash(method) == hash(dataclasses.replace(method))


PASSES = [  # as published, or counted by hand
    ("trajectory", dict(data_proportion=0.5, guidance_eq="none"), 3.0),
    ("alphaflow", dict(data_proportion=0.5, guidance_eq="none"), 3.5),
    ("alphaflow", dict(data_proportion=0.25), 5.5),
    ("alphaflow", dict(data_proportion=0.5, omega=0.2, kappa=0.92), 5.0),
    ("soflow", dict(guidance_eq="mix"), 4.5),
    ("soflow", dict(guidance_eq="none"), 3.25),
    ("soflow", dict(guidance_eq="none", data_proportion=0.0), 4.0),
    ("splitmeanflow", dict(guidance_eq="none"), 3.5),
    ("splitmeanflow", {}, 4.25),
    ("consistency", dict(guidance_eq="none", data_proportion=0.0), 4.0),
    ("tim", dict(guidance_eq="none", data_proportion=0.5), 4.0),
    ("tim", dict(data_proportion=0.5), 6.0),
    ("shortcut", dict(data_proportion=0.875), 3.25),
]


@pytest.mark.parametrize("name, options, passes", PASSES)
def test_forward_passes(name, options, passes):
    assert make.method(name, **options).passes(256) == passes


@pytest.mark.parametrize("guidance, passes", [("mix", 4.5), ("none", 3.25)])
def test_flops_of_soflow_b4(guidance, passes):
    """By XLA, over all operations of the step."""
    words = ["--config=configs/load_config.py:soflow_b4", f"--config.method.guidance_eq={guidance}"]
    config = costs.config_without_data(words)[0]
    by_hand = parts.make(config).module.flops((32, 32, 4)) * 256
    assert 1 < count(config, plain=False) / (passes * by_hand) < 1.03
    assert get_config().model.cls == config.model.cls


def test_shortcut_draws_lie_on_the_grid():
    method = make.method("shortcut", data_proportion=0.875)
    draws = method.draw(jax.random.key(0), (256, 2, 2, 1), 0)
    h = np.asarray(draws.t - draws.r)
    levels, counts = np.unique(h, return_counts=True)
    assert levels.tolist() == [2.0**-k for k in (7, 6, 5, 4, 3, 2, 1, 0)]
    assert counts.tolist() == [224, 4, 4, 4, 4, 4, 4, 8]
    assert np.all(draws.t / h % 1 == 0) and draws.t.min() > 0 and draws.t.max() <= 1
    assert draws.guided.sum() == 4 and np.all(h[draws.guided] == 2 / 128)
    assert np.all(h[draws.drop] == 1 / 128)


def test_tim_takes_some_rows_to_the_data():
    method = make.method("tim", data_proportion=0.5)
    draws = method.draw(jax.random.key(0), (40, 2, 2, 1), 0)
    assert (draws.r == 0).sum() == 4 and (draws.r == draws.t).sum() == 20


def test_the_consistency_grid_doubles():
    method = make.method("consistency", data_proportion=0.0, alpha_schedule="grid", alpha_end=700)
    for step, n in ((0, 1), (99, 1), (100, 2), (650, 64)):
        draws = method.draw(jax.random.key(step), (64, 2, 2, 1), jnp.int32(step))
        assert int(method.grid(jnp.int32(step))) == n
        np.testing.assert_allclose(draws.alpha * draws.t, 1 / n, rtol=1e-5)
        np.testing.assert_allclose(draws.t * n, np.round(draws.t * n), rtol=1e-5)


def test_fresh_noise_depends_on_image_and_step_alone():
    index, shape = jnp.array([7, 3]), (2, 2, 1)
    noise = sample.draw_fresh(5, index, shape, jnp.int32(2))
    key = jax.random.fold_in(jax.random.key(5), 2)
    for i, found in zip(index, noise, strict=True):
        expected = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), 2), shape)
        np.testing.assert_array_equal(found, expected)
    assert not np.isin(noise, sample.draw_noise(5, index, shape)).any()


# A run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("family") / "records")


def config_of(records, name="digits", **options):
    options = OPTIONS | {"dataset.root": records, "training.sample_on_training": False} | options
    return make.config(*(f"{k}={v}" for k, v in options.items()), name=name)


@pytest.mark.slow
def test_resuming_in_the_middle_of_the_schedule_changes_no_bit(records, tmp_path):
    """24 steps at once, and the last ones again from a checkpoint; on either side a phase ends."""
    options = {"method.name": "alphaflow", "method.alpha_end": 24, "fid.on_training": False}
    config = config_of(records, **options, **{"training.checkpoint_per_step": 13})
    whole = train.train_job(config, tmp_path)
    assert layout.steps(tmp_path) == [13, 24]
    shutil.rmtree(tmp_path / "checkpoints" / "24")
    jax.tree.map(np.testing.assert_array_equal, train.train_job(config, tmp_path), whole)


# Starting points ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(records, tmp_path_factory):
    """A short flow matching run, its best checkpoint, and the lines of its log."""
    folder = tmp_path_factory.mktemp("finished")
    words = {"method.name": "flow", "training.num_steps": 6, "fid.on_training": True}
    words |= {"training.fid_per_step": 2, "training.keep_best": "fid", "fid.labels": "data"}
    words |= {"training.checkpoint_per_step": 3, "sampling.num_steps": "1,2"}
    words |= {"training.sample_on_training": True, "training.sample_per_step": 4}
    words |= {"training.sample_steps": ""}
    config = config_of(records, **words)
    return config, train.train_job(config, folder), folder


def test_cadences_in_steps(finished):
    _, _, folder = finished
    assert layout.steps(folder) == [3, 4, 6]  # the newest three of 2, 3, 4 and 6
    grids = sorted(path.name for path in (folder / "samples").glob("grid_*"))
    assert grids == [f"grid_0000000{n}{steps}.png" for n in (4, 6) for steps in ("", "_2step")]
    results = json.loads((folder / "results.json").read_text())
    assert [r["checkpoint_step"] for r in results] == [2, 2, 4, 4, 6, 6]
    assert {r["labels"] for r in results} == {"data"} and len(results[0]["label_counts"]) == 32


def test_the_best_checkpoint_stays_and_can_be_loaded(finished, tmp_path):
    _, _, folder = finished
    results = json.loads((folder / "results.json").read_text())
    first = [r for r in results if r["num_steps"] == 1]
    best = min(first, key=lambda r: r["fid"])
    about = json.loads((folder / "best" / "best.json").read_text())
    how = about.pop("measure")
    assert about == {"metric": "fid", "value": best["fid"], "step": best["checkpoint_step"]}
    assert weights.read(folder / "best").step == best["checkpoint_step"]
    # Worse ones change nothing, better ones take its place.
    best_of.keep_best(folder, 3, "fid", best["fid"] + 1, measure=how)
    assert layout.steps(folder / "best") == [best["checkpoint_step"]]
    best_of.keep_best(folder, 3, "fid", best["fid"] - 1, measure=how)
    assert layout.steps(folder / "best") == [3]
    best_of.keep_best(folder, 4, "fid", best["fid"] + 1, measure="another evaluator")
    assert layout.steps(folder / "best") == [4]
    best_of.keep_best(folder, 6, "precision", 0.5, True)  # another metric begins anew
    best_of.keep_best(folder, 4, "precision", 0.6, True)
    assert layout.steps(folder / "best") == [4]


def test_beginning_with_the_weights_of_a_run(records, finished, tmp_path, caplog):
    _, state, folder = finished
    config = config_of(
        records, **{"init_from": folder, "training.num_steps": 0, "training.ema_val": "0.9,0.99"}
    )
    model = parts.make(config)
    recipe, _ = train.make_recipe(config.training, model, 10)
    init = partial(train.init_state, recipe, model.module, model.image_shape)
    (average,) = state.ema_params.values()
    with caplog.at_level("INFO"):
        begun, place, _ = resume.start(config, tmp_path, model.mesh, model.module, init, {})
    assert int(begun.step) == 0 and place is None
    assert begun.ema_params.keys() == {"ema_0.9", "ema_0.99"}
    for tree in (begun.params, *begun.ema_params.values()):
        jax.tree.map(np.testing.assert_array_equal, tree, average)
    assert not any(np.any(x) for x in jax.tree.leaves(begun.opt_state))
    assert ": 25 of 25 parameters taken" in caplog.text


def test_another_number_of_classes_keeps_the_row_of_none(records, finished):
    _, state, folder = finished
    config = config_of(records, **{"init_from": folder, "init_weights": "params"})
    module = parts.make(config).module.clone(num_classes=5)
    fresh = jax.device_get(network.init_params(module, jax.random.key(9), (4, 4, 1)))
    found, line = make.begin(config, module, fresh)
    table = found["y_embedder"]["embedding"]
    np.testing.assert_array_equal(table[-1], state.params["y_embedder"]["embedding"][-1])
    np.testing.assert_array_equal(table[:-1], fresh["y_embedder"]["embedding"][:-1])
    assert "new: y_embedder/embedding of 5 classes but for the row of none" in line


def test_beginning_with_a_published_checkpoint(records, golden):
    path = golden / "released_checkpoint" / "msgpack"
    expected = published.load(path)["ema_params"]
    config = config_of(records, **{"init_from": path})
    fresh = jax.tree.map(np.zeros_like, expected)
    module = parts.make(config).module  # of which only the name of its label table counts
    found, _ = make.begin(config, module, fresh)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "words, line",
    [
        ({"init_from": "{run}", "init_format": "sit"}, "init_format: .* is no .pt file"),
        ({"init_from": "{run}", "model.patch_size": 1}, "of another shape: .*x_embedder/kernel"),
        (
            {"init_from": "{run}", "model.time_cond": "t,r"},
            "missing: r_embedder/.*left over: h_emb",
        ),
        ({"init_from": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused(records, finished, words, line):
    words = {name: str(value).format(run=finished[2]) for name, value in words.items()}
    config = config_of(records, **words)
    module = parts.make(config).module
    fresh = jax.eval_shape(lambda: network.init_params(module, jax.random.key(9), (4, 4, 1)))
    with pytest.raises((ValueError, OSError), match=line):
        make.begin(config, module, jax.tree.map(lambda a: np.zeros(a.shape), fresh))


def test_the_number_of_classes_can_be_left_to_the_records(records):
    config = config_of(records, **{"dataset.num_classes": ""})
    assert config.dataset.num_classes == -1
    settled = run_config.settle(config, "nowhere", {})
    assert settled.is_locked and config.dataset.num_classes == -1
    assert settled.dataset.num_classes == OPTIONS["dataset.num_classes"]
