"""Improved MeanFlow: the objective against its plain form, its cost, its two backbones, a run."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import make
import numpy as np
import optax
import plain_improved
import pytest
from jobs import Jobs, assert_equal_runs, results
from test_benchmark import count
from test_devices import flatten

import parts
import train
from models import codec, hardware, imf_blocks, network
from utils import sharding

BATCH, STEPS = 16, 2
BACKBONES = {
    "imfDiT": ["model.cls=imfDiT", "model.depth=2", "model.aux_head_depth=1"],
    "DiT": ["model.cls=DiT", "model.depth=2"],
}
TINY = [
    "method.name=improved", "method.data_proportion=0.5", "method.class_dropout_prob=0.2",
    "model.hidden_size=32", "model.num_heads=2", "model.patch_size=2", "dataset.vae=none",
    "dataset.num_classes=3", "dataset.image_size=4", "dataset.image_channels=2",
    f"training.batch_size={BATCH}",
]  # fmt: skip


def model_of(*words, backbone="imfDiT", mesh=None):
    config = make.config(*TINY, *BACKBONES[backbone], *words)
    parts.check(config)
    return parts.make(config, mesh)


def batch_of(model):
    """Parameters of which none is zero, and a batch."""
    params = make.params(model.module, model.image_shape)
    x = jax.random.normal(jax.random.key(1), (BATCH, *model.image_shape))
    return params, x, jnp.arange(BATCH) % model.num_classes


# The objective --------------------------------------------------------------------------------


def test_equal_to_the_plain_form():
    """On a network that takes t too; the golden data have the other one."""
    model = model_of("training.grad_accum_steps=2", "model.depth=1", backbone="DiT")
    params, x, y = batch_of(model)
    draws = model.method.draw(jax.random.key(2), x.shape, 0)
    draws = draws._replace(t_min=draws.t_min.at[0].set(draws.t[0]))  # inclusive

    def ours(params):
        loss, rows = model.method.loss(model.net, params, x, {"y": y}, draws, {})
        return loss, (rows["error_u"], rows["error_v"])

    def plain(params):
        return plain_improved.loss(model.net, params, x, y, draws, model.method)

    (found, rows), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (expected, expected_rows), expected_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(
        params
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(rows, expected_rows, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    a, b = flatten(grads), flatten(expected_grads)
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_draws():
    method = make.method("improved", data_proportion=0.5, omega_max=4.0, cfg_beta=2.0)
    draws = method.draw(jax.random.key(0), (4096, 1, 1, 1), 0)
    equal = draws.t == draws.r
    assert equal.sum() == 2048 and np.all(draws.r <= draws.t)
    assert np.all(draws.t_min[equal] == 0) and np.all(draws.t_max[equal] == 1)
    assert draws.t_min[~equal].max() < 0.5 <= draws.t_max[~equal].min()
    # density like omega^-2 on [1, 4]: the median is 1.6
    assert 1 <= draws.omega.min() and draws.omega.max() < 4
    assert abs(np.median(draws.omega) - 1.6) < 0.05
    assert abs(np.mean(draws.drop) - 0.1) < 0.02 and not np.any(draws.drop & ~equal)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"omega_max": 0.5}, "omega_max must not be below 1"),
        ({"data_proportion": 1.5}, "data_proportion"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        make.method("improved", **options)


def test_without_classes_there_is_no_guidance():
    words = [*make.PIXELS, *make.NETWORKS["imfDiT"], "dataset.num_classes=0"]
    with pytest.raises(ValueError, match="omega_max must be 1 where dataset.num_classes is 0"):
        parts.make(make.config(*words))


# Its cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, ratio", [("imf_b2", 0.79), pytest.param("imf_xl2", 0.75, marks=pytest.mark.slow)]
)
def test_a_step_takes_less_than_the_plain_one(name, ratio):
    batch = 64
    config = make.config(f"training.batch_size={batch}", name=name)
    ours, plain = count(config, plain=False), count(config, plain=True)
    assert ours <= ratio * plain, ours / plain
    model = parts.make(config)
    assert model.method.passes(batch) == 5
    # XLA also counts what is not a product, a few percent.
    assert 1 < ours / (batch * model.step_flops(batch)) < 1.05


# Backbones ------------------------------------------------------------------------------------


def test_v_is_there_where_the_parameters_hold_it():
    """In the DiT; tests/parity has the other one."""
    model = model_of("model.depth=1", backbone="DiT")
    params, x, y = batch_of(model)
    c = {"y": y} | dict.fromkeys(("t", "h", "omega", "t_min", "t_max"), jnp.full(BATCH, 0.5))
    net = jax.jit(model.net)
    (both,) = net(params, (x, c))
    less = {k: p for k, p in params.items() if k not in model.module.only_for_training}
    (alone,) = net(less, (x, c))
    assert len(less) < len(params) and alone.v is None and both.v.shape == both.u.shape
    np.testing.assert_allclose(alone.u, both.u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("v, count", [(True, 3), (False, 2)])
def test_all_blocks_are_counted_where_memory_is(v, count, monkeypatch):
    """The card decides what to keep by the blocks that are crossed: those of v's head too."""
    counted = []
    monkeypatch.setattr(
        hardware, "remat", lambda block, *arguments: counted.append(arguments[2]) or block
    )
    model = model_of()
    module = model.module.clone(predicts_v=v)
    network.param_shapes(module, model.image_shape)
    assert set(counted) == {count}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_gradient_of_the_tokens_turns_no_array(platform, monkeypatch):
    """On a card its sum over the batch alone would have XLA lay out the whole backward pass."""
    monkeypatch.setattr(hardware, "platform", lambda: platform)
    model = model_of()
    params, x, y = batch_of(model)

    def total(params):
        c = {"t": jnp.ones(BATCH), "h": jnp.ones(BATCH), "y": y}
        return model.module.apply({"params": params}, x, c).u.sum()

    text = jax.jit(jax.grad(total)).lower(params).as_text()
    assert text.count("LayoutConstraint") == (platform == "gpu")


def test_channels_in_halves_are_those_of_neighbours(monkeypatch):
    """What a TPU computes in half precision, where queries and keys have another order."""
    attention = imf_blocks.Attention(2, jnp.bfloat16, fused=False)
    draw = np.random.default_rng(0).standard_normal
    x = jnp.asarray(draw((2, 24, 32), np.float32))
    shapes = jax.eval_shape(lambda: attention.init(jax.random.key(0), x, False, False))
    params = jax.tree.map(lambda p: draw(p.shape, np.float32), shapes)
    outs = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(hardware, "platform", lambda platform=platform: platform)
        outs.append(np.asarray(attention.apply(params, x, False, False), np.float32))
    assert np.linalg.norm(outs[0] - outs[1]) < 0.02 * np.linalg.norm(outs[0])


def test_imf_dit_serves_mean_flow():
    """Without guidance to give, and without a head of v that nothing would train."""
    model = model_of("method.name=meanflow", "method.class_dropout_prob=0.1")
    params, x, y = batch_of(model)
    assert not params.keys() & set(model.module.only_for_training)
    draws = model.method.draw(jax.random.key(2), x.shape, 0)
    loss = lambda p: model.method.loss(model.net, p, x, {"y": y}, draws, {})[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    embedding = grads.pop("embedding")
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves((grads, embedding["h_embedder"])))


@pytest.mark.parametrize(
    "words, named",
    [
        (["method.name=flow", "method.data_proportion=0.75"], "told h = t - r and not t"),
        (["model.aux_head_depth=2"], "model.aux_head_depth"),
        (["model.aux_head_depth=0"], "needs model.aux_head_depth"),
        (["model.num_heads=3"], "model.hidden_size"),
        (["model.patch_size=3"], "patch size 3"),
        (["model.time_cond=t,r"], "model.time_cond is no option of model.cls imfDiT"),
        (["sampling.channels=1"], "guides all channels"),
        (["sampling.omega=1,0"], "sampling.omega must be above 0"),
        (["method.kappa=0.2"], "method.kappa is no option of method.name improved"),
    ],
)
def test_what_does_not_fit_is_refused(words, named):
    with pytest.raises(ValueError, match=named):
        model_of(*words)


@pytest.mark.slow
def test_any_size():
    """Patches of 4, three channels, and 1024 tokens as for latents of 128 x 128."""
    words = ["dataset.image_size=128", "dataset.image_channels=3", "model.patch_size=4"]
    model = model_of(*words, "model.hidden_size=4")
    params, x, y = batch_of(model)
    c = {"y": y} | dict.fromkeys(("t", "h", "omega", "t_min", "t_max"), jnp.full(BATCH, 0.5))
    c = jax.tree.map(lambda a: a[:1], c)
    (found,) = jax.jit(model.net)(params, (x[:1], c))
    assert found.u.shape == found.v.shape == (1, *model.image_shape)
    assert np.all(np.isfinite(found.u))


@pytest.mark.parametrize("half", [False, True])
def test_between_blocks_is_the_type_of_the_products(half):
    model = model_of(f"training.half_precision={half}")
    params, x, y = batch_of(model)
    c = {"y": y} | dict.fromkeys(("t", "h", "omega", "t_min", "t_max"), jnp.full(BATCH, 0.5))
    equations = jax.make_jaxpr(model.net)(model.module.cast(params), (x, c)).eqns
    stacks = [e.outvars[0].aval.dtype for e in equations if e.primitive.name == "scan"]
    assert stacks == [jnp.bfloat16 if half else jnp.float32] * 3  # the trunk and two heads


@pytest.fixture(scope="module")
def gradient():
    """The gradient of a model, or of other options of its network, on one batch."""
    full = model_of()
    params, x, y = batch_of(full)
    draws = full.method.draw(jax.random.key(2), x.shape, 0)

    def of(model, **options):
        net = network.function(model.module.clone(**options))

        def loss(params):
            params = model.module.cast(params)
            return model.method.loss(net, params, x, {"y": y}, draws, {})[0]

        return flatten(jax.jit(jax.grad(loss))(params))

    return of


def test_the_gradient_as_a_card_computes_it(gradient, monkeypatch):
    half = model_of("training.half_precision=true")
    a = gradient(half)
    b = gradient(half, **make.as_on_a_card(monkeypatch))
    assert 0.9999 < a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert not np.array_equal(a, b)  # it was another way


@pytest.mark.slow
def test_half_precision_points_the_same_way_and_remat_changes_nothing(gradient):
    a = gradient(model_of())
    b = gradient(model_of("model.remat=true"))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
    b = gradient(model_of("training.half_precision=true"))
    assert 0.999 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1


# Devices --------------------------------------------------------------------------------------


def numbers(fsdp):
    """Losses and gradients of some steps on all devices."""
    model = model_of(mesh=sharding.make_mesh(fsdp))
    params, x, _ = batch_of(model)
    optimizer = optax.sgd(0.01, momentum=0.0)  # its state is the gradient
    recipe = train.Recipe(
        model.net, model.method, codec.Codec(), optimizer, (0.9,), gather=model.gather
    )
    state = jax.device_get(train.fresh_state(recipe, params))
    shardings = sharding.by_parameter(model.mesh, state)
    image = np.asarray(jnp.clip(x * 60 + 128, 0, 255), np.uint8)
    batch = {"image": image, "label": np.arange(BATCH, dtype=np.int32) % model.num_classes}
    batch = sharding.to_global(model.mesh, batch)
    state = sharding.place(state, shardings)
    step = train.make_step(recipe, jax.random.key(7), model.mesh, shardings)
    losses = []
    for _ in range(STEPS):
        state = step(state, batch, {})
        losses.append(float(state.sums["loss_u"]))
    return {"losses": losses, "grads": flatten(state.opt_state)}


CODE = """
import sys
sys.path.insert(0, "tests")
import numpy as np, test_imf
np.savez(r"{folder}/8.npz", **test_imf.numbers(fsdp=8))
"""


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path, run_python):
    run_python(CODE.format(folder=tmp_path), devices=8)
    one, eight = numbers(fsdp=1), np.load(tmp_path / "8.npz")
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    error = np.linalg.norm(eight["grads"] - one["grads"])
    assert error <= 1e-5 * np.linalg.norm(one["grads"])


# A run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_killed_and_a_sweep_of_guidance(tmp_path):
    """Bit-identical after a kill; every combination of guidance is a result of its own."""
    jobs = Jobs(tmp_path, "digits_imf")
    options = {
        "method.guidance_eq": None, "sampling.t_min": 0, "sampling.t_max": 1,
        "model.cls": "imfDiT", "model.depth": 2, "model.aux_head_depth": 1,
        "sampling.omega": 2, "training.num_steps": 12, "training.checkpoint_per_epoch": 1,
    }  # fmt: skip
    whole, killed = jobs.killed(options)
    assert_equal_runs(whole, killed)
    assert results(whole)[-1]["omega"] == 2

    sweep = {
        "eval_only": True, "load_from": whole, "sampling.omega": "1,3", "sampling.t_min": "0,0.4",
        "sampling.t_max": "0.6,1", "sampling.num_steps": "1,2", "fid.labels": "balanced",
        "fid.weights": "ema,params",
    }  # fmt: skip
    (text,) = jobs.train(tmp_path / "sweep", options | sweep)
    keys = ("weights", "num_steps", "omega", "t_min", "t_max")
    found = results(tmp_path / "sweep")
    asked = itertools.product(("ema", "params"), (1, 2), (1, 3), (0, 0.4), (0.6, 1))
    assert [tuple(result[key] for key in keys) for result in found] == list(asked)
    best = min(found, key=lambda result: result["fid"])
    assert text.splitlines()[-1].startswith(f"best: fid@32 {best['fid']:.4f} ({best['weights']}, ")


def test_no_field_of_the_objective_is_without_an_option():
    fields = {field.name for field in dataclasses.fields(parts.OBJECTIVES["improved"])}
    assert fields - {"num_classes"} <= set(make.config().method)
