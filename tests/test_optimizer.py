"""Muon by the axes of a network's arrays, and what a step of it does."""

from functools import partial

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import pytest

import optimizer
import parts
import train
from configs import default
from models.network import Axes
from run import cadence
from utils import sharding, trees


def muon(axes, **options):
    training = default.get_config().training
    training.update({"optimizer": "muon", "learning_rate": 0.01, **options})
    return optimizer.make_optimizer(training, 10, axes=lambda: axes)[0]


def kernels_of(name):
    """{name of an array: whether Muon has it} of a backbone."""
    config = make.config(*make.PIXELS, *NETWORKS[name])
    made = parts.make(config)
    shapes = made.param_shapes()
    dims = optimizer.matrices(made.module.axes(shapes))
    arrays = jax.tree_util.tree_leaves_with_path(shapes)
    flat = jax.tree.leaves(dims, is_leaf=lambda d: d is None or isinstance(d, tuple))
    return {
        "/".join(key.key for key in path): (array.shape, dim)
        for (path, array), dim in zip(arrays, flat, strict=True)
    }


PMF = ["model.cls=pmfDiT", *make.SIZES, "model.depth=2", "model.aux_head_depth=1"]
NETWORKS = make.NETWORKS | {"pmfDiT": [*PMF, "method.name=pixel"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_muon_has_every_matrix_and_nothing_else(name):
    for array, (shape, dim) in kernels_of(name).items():
        *parents, last = array.split("/")
        convolution = "conv" in array or parents[-1:] in (["x_embedder"], ["x_embedder2"])
        assert (dim is not None) == (last == "kernel" and not convolution), (array, shape)
        if dim:
            assert len(shape) - len(dim.reduction_axis + dim.output_axis) <= 2, array


def test_blocks_are_orthogonalised_one_by_one():
    """A stack of kernels gets what its kernels get alone; a stack of biases is Adam's."""
    rng = np.random.default_rng(0)
    grads = {"kernel": rng.normal(size=(3, 6, 4)), "bias": rng.normal(size=(3, 4))}
    grads = jax.tree.map(jnp.float32, grads)
    axes = {"kernel": Axes((0,), (1,), (2,)), "bias": Axes((0,), (), (1,))}
    change = muon(axes)
    stacked, _ = change.update(grads, change.init(grads), grads)
    for i in range(3):
        one = jax.tree.map(lambda g, i=i: g[i], grads)
        alone = muon({"kernel": Axes((), (0,), (1,)), "bias": Axes((), (), (0,))})
        expected, _ = alone.update(one, alone.init(one), one)
        for name in one:
            np.testing.assert_allclose(stacked[name][i], expected[name], rtol=1e-4, atol=1e-6)
    # The singular values of an orthogonalised matrix are near 1, times the learning rate.
    values = np.linalg.svd(np.asarray(stacked["kernel"]), compute_uv=False)
    assert np.all((0.5 < values / 0.01) & (values / 0.01 < 1.3))


def test_without_axes_the_wrong_half_would_be_orthogonalised():
    """Why the axes are told: by their number alone a stack of biases would pass for a matrix."""
    params = {"kernel": jnp.ones((3, 6, 4)), "bias": jnp.ones((3, 4))}
    state = optax.contrib.muon(0.01).init(params)
    masked = state.inner_states["muon"].inner_state[0].mu
    assert isinstance(masked["kernel"], optax.MaskedNode) and masked["bias"].shape == (3, 4)


WIDE = ["model.hidden_size=64", "training.optimizer=muon"]


def updated(name, fsdp):
    """Two updates of a network's arrays over all devices: {name of an array: what it becomes}."""
    made = parts.make(make.config(*make.PIXELS, *NETWORKS[name], *WIDE), sharding.make_mesh(fsdp))
    params = make.params(made.module, made.image_shape)
    change = muon(made.module.axes(params))
    state = jax.eval_shape(lambda: (params, change.init(params)))
    shardings = sharding.by_parameter(made.mesh, state)

    @partial(jax.jit, in_shardings=shardings, out_shardings=shardings)
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.sin(37 * p), params)
        updates, state = change.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = sharding.place((params, change.init(params)), shardings)
    for _ in range(2):
        state = step(*state)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (fsdp > 1)
    return trees.flatten(jax.device_get(state[0]))


CODE = """
import sys
sys.path.insert(0, "tests")
import numpy as np, test_optimizer
np.savez(r"{path}", **test_optimizer.updated("{name}", fsdp=4))
"""


@pytest.mark.parametrize("name", ["pmfDiT", pytest.param("DiT", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(name, tmp_path, run_python):
    run_python(CODE.format(path=tmp_path / "8.npz", name=name), devices=8)
    with np.load(tmp_path / "8.npz") as file:
        for array, expected in updated(name, fsdp=1).items():
            np.testing.assert_allclose(file[array], expected, atol=1e-5, err_msg=array)


def test_its_products_of_run_b4():
    """Five times three products of a matrix (m, n), m <= n; all else is little."""
    made = parts.make(make.config(name="run_b4"))
    params, needed = made.param_shapes(), 0
    axes = made.module.axes(params)
    for p, dims in zip(jax.tree.leaves(params), trees.flatten(axes).values(), strict=True):
        if len(dims.into) == 1:
            m, n = sorted(p.shape[dim[0]] for dim in (dims.into, dims.out))
            count = p.size // (m * n)
            needed += count * 5 * (4 * m * m * n + 2 * m**3)
    change = muon(axes)
    update = jax.jit(change.update)
    lowered = update.lower(params, jax.eval_shape(change.init, params), params)
    assert 1 < lowered.cost_analysis()["flops"] / needed < 1.03
    assert needed == pytest.approx(2.27e12, rel=0.01)


def test_run_b4_trains_by_muon():
    """A small one: the same records over and over are learned."""
    words = ["model.depth=1", "model.num_heads=2", "training.batch_size=16", *WIDE]
    words += ["training.log_per_step=1", "training.learning_rate=0.01"]
    config = make.config(*words, "training.half_precision=false", name="run_b4")
    made = parts.make(config)
    recipe, _ = train.make_recipe(config.training, made, 30)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    moments = 0.3 * rng.standard_normal((1, *made.image_shape[:2], 8), np.float32) + 4
    batch = {"moments": np.repeat(moments, 16, axis=0), "label": np.zeros(16, np.int32)}
    init = partial(train.init_state, recipe, made.module, made.image_shape)
    state = jax.jit(init)(key)
    step = jax.jit(partial(train.train_step, recipe, key))
    losses = []
    for _ in range(30):
        state = step(state, batch)
        losses.append(float(state.sums["v_loss"] / state.sums["steps"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses


RECORDS, BATCH = 1792, 128
LENGTHS = [
    {},
    {"warmup_epochs": 2},
    {"warmup_steps": 20},
    {"num_steps": 200},
    {"num_steps": 200, "warmup_epochs": 2},
    {"num_steps": 200, "warmup_steps": 20},
    {"lr_schedule": "const", "warmup_epochs": 2},
]


@pytest.mark.parametrize("options", LENGTHS, ids=str)
@pytest.mark.parametrize("done", [10, 60])  # within the warmup, and after it
@pytest.mark.parametrize("batch_size", [16, 256])
def test_the_rate_goes_on_where_another_batch_size_takes_over(options, done, batch_size):
    training = default.get_config().training
    training.update({"num_epochs": 10, "lr_schedule": "cosine", "warmup_init": 0.1, **options})
    training.learning_rate = 1.0

    def planned(size, past=(0, 0)):
        training.batch_size = size
        when = cadence.of_run(training, False, RECORDS, past)
        return when, optimizer.make_schedule(training, when.total, when.steps_per_epoch, past)

    before, rate = planned(BATCH)
    when, later = planned(batch_size, (done, done * BATCH / batch_size))
    assert float(later(done)) == pytest.approx(float(rate(done)), abs=2e-3)
    assert when.epoch(done) == before.epoch(done)
    end = 1.0 if training.lr_schedule == "const" else 0.0
    assert float(later(when.total)) == pytest.approx(end, abs=1e-3)
    assert options.get("num_steps", 0) == when.total or when.epoch(when.total) == 10


def test_lengths_in_epochs_count_records():
    training = default.get_config().training
    training.update({"num_epochs": 3, "fid_per_epoch": 1, "checkpoint_per_step": 7})
    training.batch_size = 16
    old = cadence.of_run(training, True, 100)
    assert old.total == 18 and [s for s in range(1, 19) if old.evaluation.due(s)] == [6, 12, 18]
    training.batch_size = 32
    new = cadence.of_run(training, True, 100, past=(8, 4))  # 128 records seen
    assert new.total == 13 and new.epoch(13) == 3
    assert [s for s in range(9, 14) if new.evaluation.due(s)] == [10, 13]
    assert [s for s in range(9, 15) if new.checkpoint.due(s)] == [13, 14]
    seen_all = cadence.of_run(training, True, 100, past=(80, 40))
    assert seen_all.total == 80
